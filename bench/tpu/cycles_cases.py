"""The grouped products that `bench.cycles` compares, and who makes them with which tiles."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bench.model.workloads import GemmShape
from moejax import get_preset
from pallas_kernels.activations import gated_halves
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul

_CASES = (
    ("decode", "qwen3-30b-a3b", 8),
    ("decode", "deepseek-v3", 32),
    ("prefill", "qwen3-30b-a3b", 8),
    ("prefill", "deepseek-v3", 128),
    ("decode", "mixtral-8x7b", 1),
    ("prefill", "mixtral-8x7b", 8),
)
"""Step, model, and devices that share its experts: more of them in prefill for large models, as the compiler walks
through a kernel at some 6000 cycles a second. Those that it is done with soonest come first."""

_ROWS = {"decode": 48, "prefill": 1024}
"""Rows of an expert."""

OURS, FUSED, ACTIVATION = "ours", "ours, fused", "activation"
MEGABLOX = "megablox"
TOKAMAX = ("tokamax v1", "tokamax v2")

WAITS, INSTRUCTIONS = "cycles", "instructions"
"""Kinds of figures: of the whole kernel, and of it without its copies."""

KINDS = (INSTRUCTIONS, WAITS)

GUESSED = "the compiler guessed the trips of its loops"
"""Why an estimate does not count."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A grouped product in BF16: balanced groups of rows, as one device of a model's slice has them."""

    model: str
    step: str
    product: str
    shape: GemmShape

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return f"{self.model} {self.step} {self.product}"

    @property
    def sizes(self) -> list[int]:
        """Rows of each group."""
        return [self.shape.M] * self.shape.G


Function = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to make a product: who, and with which tiles; none of our own choice, theirs being empty too."""

    implementation: str
    tiles: tuple[int, ...] = ()

    @property
    def configuration(self) -> str:
        """The tiles in words."""
        return "×".join(map(str, self.tiles)) or "its own choice"


def all_cases() -> list[Case]:
    """Gate/up and down of each model, in a decode and a prefill step."""
    cases = []
    for step, model, ep in _CASES:
        config = get_preset(model)
        groups, hidden, width = config.num_experts // ep, config.hidden_size, config.intermediate_size
        cases.append(Case(model, step, "gate/up", GemmShape(groups, _ROWS[step], hidden, 2 * width)))
        cases.append(Case(model, step, "down", GemmShape(groups, _ROWS[step], width, hidden)))
    return cases


def choices(case: Case, kind: str) -> Mapping[str, list[Choice]]:
    """By implementation: its choices in the order to try them; the first that compiles counts."""
    few, depth = case.step == "decode", case.shape.K
    rows = case.shape.M if few else 256
    made = {OURS: [Choice(OURS)]}
    if case.product == "gate/up":
        made[FUSED] = [Choice(FUSED)]
    # All of K at once needs the fewest instructions, where it fits the VMEM that these kernels leave to XLA's default.
    tiles = [(rows, depth, 512), (2 * rows, 1024, 1024), (rows, depth, 256), (128, 512, 512)]
    if kind == WAITS:
        if case.product == "gate/up":
            made[ACTIVATION] = [Choice(ACTIVATION)]
        made[MEGABLOX] = [Choice(MEGABLOX, tile) for tile in tiles]
    if importlib.util.find_spec("tokamax"):
        first, second = TOKAMAX
        made[first] = [Choice(first, tile) for tile in tiles]
        block_m = 128 if few else 256
        tuned = [Choice(second, (block_m, depth, 512, block_m)), Choice(second, (128, depth, 256, 128))]
        made[second] = [Choice(second), *tuned] if few else [*tuned, Choice(second)]
    return made


def function_of(choice: Choice) -> Function:
    """The function of lhs [M, K], rhs [G, K, N] and group sizes; of the product [M, N] alone for an activation."""
    if choice.implementation == OURS:
        return functools.partial(grouped_matmul, backend="pallas_tpu")
    if choice.implementation == FUSED:
        return functools.partial(grouped_gate_up, backend="pallas_tpu")
    if choice.implementation == ACTIVATION:
        return _activation
    if choice.implementation == MEGABLOX:
        return functools.partial(_megablox, tiles=choice.tiles)
    return functools.partial(_tokamax, implementation=choice.implementation, tiles=choice.tiles)


def copied_bytes(choice: Choice, case: Case) -> int | None:
    """What a kernel of the peers copies from and to HBM with its tiles, None where those are its own choice.

    They go over the columns first, so rows come once for each column tile; weights come once for all consecutive tiles
    of a group, unless K is cut.
    """
    if len(choice.tiles) < 3:
        return None
    block_m, block_k, block_n = choice.tiles[:3]
    shape, num_rows = case.shape, sum(case.sizes)
    visits, end = 0, 0
    for size in case.sizes:
        begin, end = end, end + size
        visits += -(-end // block_m) - begin // block_m
    column_tiles = -(-shape.N // block_n)
    rows_read = num_rows if choice.implementation == TOKAMAX[1] else visits * block_m
    weights_read = shape.G if block_k >= shape.K else visits
    elements = column_tiles * rows_read * shape.K + weights_read * shape.K * shape.N + num_rows * shape.N
    return elements * jnp.dtype(jnp.bfloat16).itemsize


def _activation(product: jax.Array) -> jax.Array:
    return gated_halves(product, "silu", None).astype(product.dtype)


def _megablox(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, tiles: tuple[int, ...]) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    return gmm(lhs, rhs, group_sizes, preferred_element_type=jnp.bfloat16, tiling=tiles)


def _tokamax(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, implementation: str, tiles: tuple[int, ...]
) -> jax.Array:
    """Through tokamax's own classes: its public function takes no tiles."""
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu, pallas_mosaic_tpu_v2

    config: Any = None
    names = ("tile_m", "tile_k", "tile_n", "bucket_base")
    if implementation == TOKAMAX[0]:
        if tiles:
            config = pallas_mosaic_tpu.Config(**dict(zip(names, tiles, strict=False)))
        made: Any = pallas_mosaic_tpu.PallasMosaicTpuRaggedDot(config=config, bypass_device_check=True)
    else:
        if tiles:
            config = pallas_mosaic_tpu_v2.Config(**dict(zip(names, tiles, strict=False)))
        made = pallas_mosaic_tpu_v2.PallasMosaicTpuV2RaggedDot(config=config, bypass_device_check=True)
    return made(lhs, rhs, group_sizes=group_sizes, preferred_element_type=jnp.bfloat16)

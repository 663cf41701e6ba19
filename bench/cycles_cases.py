"""The grouped products that `bench.cycles` compares, and who makes them."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from bench.workloads import GemmShape
from moejax import get_preset
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul

_MODELS = {"deepseek-v3": 32, "mixtral-8x7b": 1, "qwen3-30b-a3b": 8}
"""Devices that share the experts of each model."""

_ROWS = {"decode": 48, "prefill": 1024}
"""Rows of an expert."""

_MEGABLOX_TILES = ((64, 1024, 1024), (128, 2048, 512), (512, 1024, 1024))
"""(block_m, block_k, block_n), of which the best counts; its default of 128 each is far slower, and slow to count."""


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


Function = Callable[..., jax.Array]


def all_cases() -> list[Case]:
    """Gate/up and down of each model, a decode and a prefill step."""
    cases = []
    for model, ep in _MODELS.items():
        config = get_preset(model)
        groups, hidden, width = config.num_experts // ep, config.hidden_size, config.intermediate_size
        for step, rows in _ROWS.items():
            cases.append(Case(model, step, "gate/up", GemmShape(groups, rows, hidden, 2 * width)))
            cases.append(Case(model, step, "down", GemmShape(groups, rows, width, hidden)))
    return cases


def implementations(case: Case) -> Mapping[str, Mapping[str, Function]]:
    """Name -> configuration -> function of lhs [M, K], rhs [G, K, N] and group sizes. The best configuration counts."""
    made: dict[str, Mapping[str, Function]] = {"ours": {"": functools.partial(grouped_matmul, backend="pallas_tpu")}}
    if case.product == "gate/up":
        made["ours, fused"] = {"": functools.partial(grouped_gate_up, backend="pallas_tpu")}
    made["megablox"] = {str(tiles): functools.partial(_megablox, tiles=tiles) for tiles in _MEGABLOX_TILES}
    if importlib.util.find_spec("tokamax"):
        made["tokamax"] = {"": functools.partial(_tokamax, implementation="mosaic")}
        made["tokamax v2"] = {"": functools.partial(_tokamax, implementation="mosaic_v2")}
    return MappingProxyType(made)


def _megablox(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, tiles: tuple[int, int, int]) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    return gmm(lhs, rhs, group_sizes, preferred_element_type=jnp.bfloat16, tiling=tiles)


def _tokamax(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, implementation: Any) -> jax.Array:
    import tokamax

    return tokamax.ragged_dot(lhs, rhs, group_sizes, implementation=implementation)

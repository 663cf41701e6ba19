"""The grouped products that `bench.cycles` compares, and who makes them with which tiles."""

import dataclasses
import importlib.util
from collections.abc import Mapping

from bench.model.shapes import GemmShape
from moejax import get_preset

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


@dataclasses.dataclass(frozen=True)
class Choice:
    """Who makes a product, and with which tiles; empty tiles leave the choice to the implementation."""

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


def copied_bytes(choice: Choice, case: Case) -> int | None:
    """What a kernel of the peers copies from and to HBM with its tiles, None where those are its own choice.

    They go over the columns first, so rows come once for each column tile; weights come once for all consecutive tiles
    of a group, unless K is cut.
    """
    if len(choice.tiles) < 3:
        return None
    block_m, block_k, block_n = choice.tiles[:3]
    shape = case.shape
    begins = [group * shape.M for group in range(shape.G)]
    visits = sum(-(-(begin + shape.M) // block_m) - begin // block_m for begin in begins)
    num_rows, column_tiles = shape.G * shape.M, -(-shape.N // block_n)
    rows_read = num_rows if choice.implementation == TOKAMAX[1] else visits * block_m
    weights_read = shape.G if block_k >= shape.K else visits
    elements = column_tiles * rows_read * shape.K + weights_read * shape.K * shape.N + num_rows * shape.N
    return elements * 2  # bytes of BF16

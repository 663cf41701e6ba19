"""What `bench.gpu` measures. Another case needs a shape, a goal, the products it consists of, and a builder.

Builders are in `bench.hopper.case_data`; they make the inputs, our way and the peers' ways to use them, and the right
answer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from bench.hopper.case_data import (
    LAYER_TOP_K,
    PERMUTE_EXPERTS,
    PERMUTE_TOP_K,
    CaseData,
    backward_bf16,
    layer_fp8,
    layer_of_preset,
    matmul_bf16,
    matmul_fp8,
    permute,
    whole_layer,
)
from bench.hopper.micro_batches import micro_batches
from bench.hopper.products import Product, layer_products
from bench.hopper.training import training
from bench.model.shapes import OPERAND_DTYPES, GemmShape
from pallas_kernels.chips import Chip
from pallas_kernels.cost import Cost, combine_cost, dispatch_cost


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached on an H200: at most `bar` µs, or at least `bar` TFLOP/s; `aim` is what we are after."""

    unit: Literal["µs", "TFLOP/s"]
    bar: float
    aim: float | None = None

    def is_met(self, microseconds: float, flops: int) -> bool:
        """Whether an operator of `flops` that takes `microseconds` reaches the bar."""
        if self.unit == "µs":
            return microseconds <= self.bar
        return flops / microseconds / 1e6 >= self.bar


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: an operator of a Mixture-of-Experts layer with a time or a rate to reach.

    Attributes:
      name: what --cases takes.
      shape: G groups of M rows, K -> N; of a layer K is the hidden and N the expert width.
      dtype: of the operands, "fp8" or "bf16".
      goal: what is to be reached.
      build: makes the problem for a shape.
      products: its grouped products, which run one after the other.
      moves: the least work of its other kernels.
      note: what the name does not say, for people.
      tolerance: the largest relative error of a result that counts as right.
    """

    name: str
    shape: GemmShape
    dtype: Literal["fp8", "bf16"]
    goal: Goal
    build: Callable[[GemmShape], CaseData]
    products: tuple[Product, ...] = ()
    moves: tuple[Cost, ...] = ()
    note: str = ""
    tolerance: float = 2e-2

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The least work of each of its kernels."""
        return *(product.cost for product in self.products), *self.moves

    @property
    def flops(self) -> int:
        """FLOPs of all its kernels."""
        return sum(cost.flops for cost in self.costs)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of main memory that all its kernels move at the least."""
        return sum(cost.hbm_bytes for cost in self.costs)

    def floor_us(self, chip: Chip) -> float:
        """µs that no implementation beats on `chip`."""
        dtype = OPERAND_DTYPES[self.dtype]
        return sum(cost.floor_seconds(chip, dtype) for cost in self.costs) * 1e6


def select_cases(names: Sequence[str] | None) -> tuple[Case, ...]:
    """The cases called by these names, in the order of the table; all for None.

    Raises:
      ValueError: a name is unknown.
    """
    if names is None:
        return tuple(CASES.values())
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(
            f"unknown case {', '.join(map(repr, unknown))} in --cases; expected some of {', '.join(CASES)}"
        )
    return tuple(case for name, case in CASES.items() if name in names)


def _moves(tokens: int, top_k: int, hidden: int) -> tuple[Cost, ...]:
    return dispatch_cost(tokens, tokens * top_k, hidden), combine_cost(tokens, tokens * top_k, hidden)


def _chosen(num_experts: int, top_k: int, tokens: int) -> int:
    """How many experts so many tokens choose on average, if each choice is as likely."""
    return round(num_experts * (1 - (1 - top_k / num_experts) ** tokens))


def _gpt_oss(tokens: int, num_layers: int) -> dict[str, Any]:
    """A chain of layers of gpt-oss-120b, of which few tokens choose some experts only; weights in FP8."""
    shape = GemmShape(_chosen(128, 4, tokens), 1, 2880, 2880)
    build = functools.partial(layer_of_preset, preset="gpt-oss-120b", num_tokens=tokens, num_layers=num_layers)
    products, moves = layer_products(shape, "fp8"), _moves(tokens, 4, shape.K)
    return {"shape": shape, "dtype": "fp8", "build": build, "products": products, "moves": moves}


def _layer(layer: GemmShape, tokens: int, dtype: Literal["fp8", "bf16"], num_layers: int) -> dict[str, Any]:
    """A chain of layers forward, router and all, on so many tokens; in FP8 weights are rounded beforehand."""
    in_8_bits, choices = dtype == "fp8", tokens * LAYER_TOP_K
    build = functools.partial(whole_layer, in_8_bits=in_8_bits, num_layers=num_layers)
    shape = dataclasses.replace(layer, M=max(1, choices // layer.G))
    if choices < 2 * layer.G:
        shape = dataclasses.replace(layer, G=_chosen(layer.G, LAYER_TOP_K, tokens), M=1)
        build = functools.partial(build, num_tokens=tokens, num_experts=layer.G)
    products = layer_products(shape, "fp8-blocks" if in_8_bits else "bf16", result_in_8_bits=in_8_bits)
    moves = _moves(tokens, LAYER_TOP_K, shape.K)
    return {"shape": shape, "dtype": dtype, "build": build, "products": products, "moves": moves}


def _training(name: str, shape: GemmShape, in_8_bits: bool, goal: Goal, note: str) -> Case:
    """Each product has two gradients of its own cost, and rows go both ways twice."""
    products = layer_products(shape, "bf16") * 3
    moves = _moves(shape.G * shape.M // LAYER_TOP_K, LAYER_TOP_K, shape.K) * 2
    build = functools.partial(training, in_8_bits=in_8_bits)
    return Case(name, shape, "fp8" if in_8_bits else "bf16", goal, build, products, moves, note, 8e-2)


def _sums(name: str, shape: GemmShape, in_8_bits: bool, goal: Goal, note: str) -> Case:
    """One of several micro-batches whose gradients are added up."""
    case = _training(name, shape, in_8_bits, goal, note)
    return dataclasses.replace(case, build=functools.partial(micro_batches, in_8_bits=in_8_bits))


_DECODE, _DOWN = GemmShape(8, 48, 7168, 2048), GemmShape(8, 48, 2048, 7168)
_PREFILL, _PREFILL_BACK = GemmShape(8, 4096, 7168, 4096), GemmShape(8, 4096, 4096, 7168)
_MANY = GemmShape(64, 64, 2048, 1536)
# A layer with the rows of 32768 tokens, and one on one of 8 chips with those of 4096.
_QWEN3, _DEEPSEEK = GemmShape(128, 2048, 2048, 768), GemmShape(32, 1024, 7168, 2048)
_MICRO = dataclasses.replace(_QWEN3, M=128)  # the rows of 2048 tokens
_PERMUTE = GemmShape(PERMUTE_EXPERTS, 16384, 4096, 4096)

_BLOCKS = (Product(_PREFILL, "fp8-blocks"),)
_matmul_fp8_blocks = functools.partial(matmul_fp8, lhs_scaling="1x128", rhs_scaling="128x128", peers=())
_FP8_LAYER = layer_products(_DECODE, "fp8", result_in_8_bits=True)
# Both gradients and the product itself cost the same: two of the three matrices are read, the third is written.
_GRADIENTS = Product(_PREFILL, "bf16"), Product(_PREFILL_BACK, "bf16", transposed=True)
_MOVES = _moves(_PERMUTE.M, PERMUTE_TOP_K, _PERMUTE.K)

_SMALL, _SCALES, _GATED = "many small experts", "scales 1x128 and 128x128", "gate/up with silu, then down"
_WHOLE = "Qwen3-30B-A3B's layer, wall time"
_BOTH, _ROUTED = "both gradients", "route, pack and combine 16384 tokens, top 2"

_TABLE = (
    Case("decode-fp8", _DECODE, "fp8", Goal("µs", 32, 28.5), matmul_fp8, (Product(_DECODE, "fp8"),)),
    Case("decode-bf16", _DECODE, "bf16", Goal("µs", 60, 56), matmul_bf16, (Product(_DECODE, "bf16"),)),
    Case("many-bf16", _MANY, "bf16", Goal("µs", 105, 97), matmul_bf16, (Product(_MANY, "bf16"),), note=_SMALL),
    Case("prefill-bf16", _PREFILL, "bf16", Goal("TFLOP/s", 725, 760), matmul_bf16, (Product(_PREFILL, "bf16"),)),
    Case("prefill-fp8", _PREFILL, "fp8", Goal("TFLOP/s", 1350, 1480), matmul_fp8, (Product(_PREFILL, "fp8"),)),
    Case("prefill-fp8-blocks", _PREFILL, "fp8", Goal("TFLOP/s", 1150), _matmul_fp8_blocks, _BLOCKS, note=_SCALES),
    Case("down-fp8", _DOWN, "fp8", Goal("µs", 34, 30), matmul_fp8, (Product(_DOWN, "fp8"),)),
    # Everyone rounds to FP8 between the two products, in a way of his own.
    Case("layer-fp8", _DECODE, "fp8", Goal("µs", 95, 86), layer_fp8, _FP8_LAYER, note=_GATED, tolerance=5e-2),
    Case("backward-bf16", _PREFILL, "bf16", Goal("TFLOP/s", 550, 650), backward_bf16, _GRADIENTS, note=_BOTH),
    Case("permute-fp16", _PERMUTE, "bf16", Goal("µs", 260, 210), permute, moves=_MOVES, note=_ROUTED),
    Case("qwen3-fp8-1", **_layer(_QWEN3, 1, "fp8", 24), goal=Goal("µs", 50, 30), note=f"{_WHOLE}, one token"),
    Case("qwen3-fp8-8", **_layer(_QWEN3, 8, "fp8", 24), goal=Goal("µs", 120, 100), note="the same, 8 tokens"),
    Case("qwen3-fp8-64", **_layer(_QWEN3, 64, "fp8", 24), goal=Goal("µs", 177, 158), note="the same, 64 tokens"),
    Case("gpt-oss-fp8-1", **_gpt_oss(1, 12), goal=Goal("µs", 75, 50), note="gpt-oss-120b's, one token"),
    Case("gpt-oss-fp8-8", **_gpt_oss(8, 8), goal=Goal("µs", 320, 270), note="the same, 8 tokens"),
    Case("qwen3-bf16-16384", **_layer(_QWEN3, 16384, "bf16", 3), goal=Goal("µs", 2500, 2000), note="16384 tokens"),
    Case("qwen3-bf16-32768", **_layer(_QWEN3, 32768, "bf16", 3), goal=Goal("TFLOP/s", 510, 560), note="32768 tokens"),
    Case("deepseek-fp8", **_layer(_DEEPSEEK, 4096, "fp8", 3), goal=Goal("µs", 3900, 3400), note="DeepSeek-V3's"),
    _training("qwen3-train-bf16", _QWEN3, False, Goal("TFLOP/s", 500, 560), "32768 tokens, both ways"),
    _training("qwen3-train-fp8", _QWEN3, True, Goal("TFLOP/s", 550, 625), "from BF16 parameters"),
    _training("deepseek-train-bf16", _DEEPSEEK, False, Goal("TFLOP/s", 560, 640), "4096 tokens, both ways"),
    _training("deepseek-train-fp8", _DEEPSEEK, True, Goal("TFLOP/s", 672, 784), "from BF16 parameters"),
    _sums("qwen3-sums-bf16", _MICRO, False, Goal("µs", 1950, 1700), "gradients of 2048 tokens added up, BF16"),
    _sums("qwen3-sums-fp8", _MICRO, True, Goal("µs", 2700, 2400), "the same, float32"),
)

CASES: Mapping[str, Case] = MappingProxyType({case.name: case for case in _TABLE})

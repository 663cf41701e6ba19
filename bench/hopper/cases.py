"""What `bench.gpu` measures. Another case needs a shape, a goal, what it costs at the least, and a builder.

Builders are in `bench.hopper.problems`; they make the inputs, our way and the peers' ways to use them, and the right
answer.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from bench.hopper.goals import Case, Goal
from bench.hopper.problems import (
    LAYER_TOP_K,
    PERMUTE_EXPERTS,
    PERMUTE_TOP_K,
    backward_bf16,
    layer_fp8,
    matmul_bf16,
    matmul_fp8,
    matmul_fp8_blocks,
    permute,
    whole_layer,
)
from bench.model.workloads import OPERAND_DTYPES, GemmShape
from pallas_kernels.cost import Cost, combine_cost, dispatch_cost, grouped_gate_up_cost, grouped_matmul_cost


def select_cases(names: Sequence[str] | None) -> tuple[Case, ...]:
    """The cases called by these names, in the order of the table; all for None.

    Raises:
      ValueError: a name is unknown.
    """
    if names is None:
        return tuple(CASES.values())
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"unknown case {', '.join(map(repr, unknown))} in --cases; expected some of {','.join(CASES)}")
    return tuple(case for name, case in CASES.items() if name in names)


def _matmul_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    dtype = OPERAND_DTYPES[case.dtype]
    return (grouped_matmul_cost(s.G * s.M, s.K, s.N, s.G, lhs_dtype=dtype, rhs_dtype=dtype),)


def _layer_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    dtype = OPERAND_DTYPES[case.dtype]
    gate_up = grouped_gate_up_cost(s.G * s.M, s.K, s.N, s.G, lhs_dtype=dtype, rhs_dtype=dtype)
    down = grouped_matmul_cost(s.G * s.M, s.N, s.K, s.G, lhs_dtype=dtype, rhs_dtype=dtype)
    return gate_up, down


def _backward_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    rows, size = s.G * s.M, OPERAND_DTYPES[case.dtype].itemsize
    # Each gradient reads two of the three matrices and writes the third.
    one = Cost(flops=s.flops, hbm_bytes=(rows * (s.K + s.N) + s.weights) * size)
    return one, one


def _permute_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    rows = s.M * PERMUTE_TOP_K
    return dispatch_cost(s.M, rows, s.K), combine_cost(s.M, rows, s.K)


def _whole_layer_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    rows = s.G * s.M
    tokens = rows // LAYER_TOP_K
    return *_layer_cost(case), dispatch_cost(tokens, rows, s.K), combine_cost(tokens, rows, s.K)


_DECODE = GemmShape(8, 48, 7168, 2048)
_PREFILL = GemmShape(8, 4096, 7168, 4096)
_MANY = GemmShape(64, 64, 2048, 1536)
_PERMUTE = GemmShape(PERMUTE_EXPERTS, 16384, 4096, 4096)
_SCALES, _GATED = "scales 1x128 and 128x128", "gate/up with silu, then down"
_ROUTED = "route, pack and combine 16384 tokens, top 2"


def _wall_case(name: str, rows: int, dtype: Literal["fp8", "bf16"], goal: Goal, note: str, calls: int) -> Case:
    shape = GemmShape(128, rows, 2048, 768)
    return Case(name, shape, dtype, goal, _whole_layer_cost, whole_layer, note, clock="wall", calls=calls)


_TABLE = (
    Case("decode-fp8", _DECODE, "fp8", Goal("µs", 32, 28.5), _matmul_cost, matmul_fp8),
    Case("decode-bf16", _DECODE, "bf16", Goal("µs", 60, 56), _matmul_cost, matmul_bf16),
    Case("many-bf16", _MANY, "bf16", Goal("µs", 105, 97), _matmul_cost, matmul_bf16, "many small experts"),
    Case("prefill-bf16", _PREFILL, "bf16", Goal("TFLOP/s", 725, 760), _matmul_cost, matmul_bf16),
    Case("prefill-fp8", _PREFILL, "fp8", Goal("TFLOP/s", 1350, 1480), _matmul_cost, matmul_fp8),
    Case("prefill-fp8-blocks", _PREFILL, "fp8", Goal("TFLOP/s", 1150), _matmul_cost, matmul_fp8_blocks, _SCALES),
    Case("down-fp8", GemmShape(8, 48, 2048, 7168), "fp8", Goal("µs", 34, 30), _matmul_cost, matmul_fp8),
    # Everyone rounds to FP8 between the two products, in a way of his own.
    Case("layer-fp8", _DECODE, "fp8", Goal("µs", 95, 86), _layer_cost, layer_fp8, _GATED, tolerance=5e-2),
    Case("backward-bf16", _PREFILL, "bf16", Goal("TFLOP/s", 550, 650), _backward_cost, backward_bf16, "both gradients"),
    Case("permute-fp16", _PERMUTE, "bf16", Goal("µs", 260, 210), _permute_cost, permute, _ROUTED),
    _wall_case("qwen3-fp8-64", 4, "fp8", Goal("µs", 210, 165), "Qwen3-30B-A3B's layer, 64 tokens, wall time", calls=8),
    _wall_case("qwen3-bf16-16384", 1024, "bf16", Goal("µs", 2500, 2000), "the same, 16384 tokens", calls=3),
)

CASES: Mapping[str, Case] = MappingProxyType({case.name: case for case in _TABLE})

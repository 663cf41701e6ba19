"""What `bench.gpu` measures: grouped products of Mixture-of-Experts layers, each with a time or a rate to reach.

A `Case` is a row of `CASES`. Another one needs a shape, a goal, what it costs at the least, and a builder, which makes
the inputs, our way and the peers' ways to do it, and the right answer:

    Case("decode-fp8", GemmShape(8, 48, 7168, 2048), "fp8", Goal("µs", 32, 28.5), _matmul_cost, _matmul_fp8)

Groups have equal numbers of rows, so that the right answer is one batched product in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bench.hopper.gpu_layers import (
    LAYER_TOP_K,
    PERMUTE_EXPERTS,
    PERMUTE_TOP_K,
    layer_inputs,
    layers,
    permute,
    permute_inputs,
)
from bench.hopper.peers import (
    Implementation,
    backward_bf16_peers,
    layer_fp8_peers,
    matmul_bf16_peers,
    matmul_fp8_peers,
)
from bench.workloads import OPERAND_DTYPES, GemmShape
from moejax import MoEConfig
from pallas_kernels.activations import gated_halves
from pallas_kernels.chips import Chip
from pallas_kernels.cost import Cost, combine_cost, dispatch_cost, grouped_gate_up_cost, grouped_matmul_cost
from pallas_kernels.grouped_matmul import Operand, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.quantize import QTensor, Scaling, dequantize, quantize


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
class Problem:
    """A case with its data.

    Attributes:
      inputs: what each implementation's `prepare` takes.
      ours: our implementation.
      peers: the others', whether installed or not.
      reference: the right answer in float32, from the inputs; a tree like each implementation's result.
      checked: the inputs to check results with where those that are timed would not do.
    """

    inputs: tuple[Any, ...]
    ours: Implementation
    peers: tuple[Implementation, ...]
    reference: Callable[..., Any]
    checked: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      name: what --cases takes.
      shape: G groups of M rows, K -> N; of a layer K is the hidden and N the expert width.
      dtype: of the operands, "fp8" or "bf16".
      goal: what is to be reached.
      costs: the least work of each of its kernels, which run one after the other.
      build: makes the problem.
      note: what the name does not say, for people.
      clock: "kernels" sums up the kernels on the device, "wall" also counts what lies between them.
      calls: how often what is measured is done in one run; the time is of one.
      tolerance: the largest relative error of a result that counts as right.
    """

    name: str
    shape: GemmShape
    dtype: Literal["fp8", "bf16"]
    goal: Goal
    costs: Callable[["Case"], tuple[Cost, ...]]
    build: Callable[["Case"], Problem]
    note: str = ""
    clock: Literal["kernels", "wall"] = "kernels"
    calls: int = 1
    tolerance: float = 2e-2

    @property
    def flops(self) -> int:
        """FLOPs of all its kernels."""
        return sum(cost.flops for cost in self.costs(self))

    @property
    def hbm_bytes(self) -> int:
        """Bytes of main memory that all its kernels move at the least."""
        return sum(cost.hbm_bytes for cost in self.costs(self))

    def floor_us(self, chip: Chip) -> float:
        """µs that no implementation beats on `chip`."""
        dtype = OPERAND_DTYPES[self.dtype][0]
        return sum(cost.floor_seconds(chip, dtype) for cost in self.costs(self)) * 1e6


def select_cases(names: str | None) -> tuple[Case, ...]:
    """The cases called by the names in "NAME,NAME", in the order of the table; all for None.

    Raises:
      ValueError: a name is unknown.
    """
    if names is None:
        return tuple(CASES.values())
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in CASES]:
        raise ValueError(f"unknown case {', '.join(map(repr, unknown))} in --cases; expected some of {','.join(CASES)}")
    return tuple(case for name, case in CASES.items() if name in wanted)


# ---- The least work --------------------------------------------------------------------------------------------------


def _matmul_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    dtype = OPERAND_DTYPES[case.dtype][0]
    return (grouped_matmul_cost(s.G * s.M, s.K, s.N, s.G, lhs_dtype=dtype, rhs_dtype=dtype),)


def _layer_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    dtype = OPERAND_DTYPES[case.dtype][0]
    gate_up = grouped_gate_up_cost(s.G * s.M, s.K, s.N, s.G, lhs_dtype=dtype, rhs_dtype=dtype)
    down = grouped_matmul_cost(s.G * s.M, s.N, s.K, s.G, lhs_dtype=dtype, rhs_dtype=dtype)
    return gate_up, down


def _backward_cost(case: Case) -> tuple[Cost, ...]:
    s = case.shape
    rows, size = s.G * s.M, OPERAND_DTYPES[case.dtype][1]
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


# ---- Data, and the ways to use it ------------------------------------------------------------------------------------


def _random(*shape: int, seed: int, scale: float = 1.0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * jnp.bfloat16(scale)


def _sizes(shape: GemmShape) -> jax.Array:
    return jnp.full(shape.G, shape.M, jnp.int32)


def _ours(function: Callable[..., Any], prepare: Callable[..., tuple[Any, ...]] | None = None) -> Implementation:
    settings = {} if prepare is None else {"prepare": prepare}
    return Implementation("moejax", "moejax", "jax", {"": function}, **settings)


def _product(lhs: Operand, rhs: Operand, group_sizes: jax.Array, transpose_rhs: bool) -> jax.Array:
    return grouped_matmul(
        lhs,
        rhs,
        group_sizes,
        transpose_rhs=transpose_rhs,
        preferred_element_type=jnp.bfloat16,
        backend="pallas_gpu",
    )


def _matmul_bf16(case: Case) -> Problem:
    s = case.shape
    return Problem(
        inputs=(_random(s.G * s.M, s.K, seed=0), _random(s.G, s.K, s.N, seed=1, scale=s.K**-0.5), _sizes(s)),
        ours=_ours(lambda lhs, rhs, sizes: _product(lhs, rhs, sizes, transpose_rhs=False)),
        peers=matmul_bf16_peers(s),
        reference=lambda lhs, rhs, sizes: _exact(lhs, rhs.mT),
    )


def _matmul_fp8(
    case: Case,
    lhs_scaling: Scaling = "per_row",
    rhs_scaling: Scaling = "per_row",
    peers: tuple[Implementation, ...] | None = None,
) -> Problem:
    """Weights lie as [G, N, K], where a scale for each row is one for each output channel."""
    s = case.shape
    lhs = _fp8(_random(s.G * s.M, s.K, seed=0), lhs_scaling)
    rhs = _fp8(_random(s.G, s.N, s.K, seed=1, scale=s.K**-0.5), rhs_scaling)
    return Problem(
        inputs=(lhs, rhs, _sizes(s)),
        ours=_ours(lambda lhs, rhs, sizes: _product(lhs, rhs, sizes, transpose_rhs=True)),
        peers=matmul_fp8_peers() if peers is None else peers,
        reference=lambda lhs, rhs, sizes: _exact(dequantize(lhs), dequantize(rhs)),
    )


def _matmul_fp8_blocks(case: Case) -> Problem:
    return _matmul_fp8(case, "1x128", "128x128", peers=())


def _layer_fp8(case: Case) -> Problem:
    s = case.shape

    def ours(x, gate_up, down, sizes):
        h = grouped_gate_up_in_8_bits(x, gate_up, sizes, transpose_rhs=True, backend="pallas_gpu")
        return _product(h, down, sizes, transpose_rhs=True)

    def reference(x, gate_up, down, sizes):
        return _exact(gated_halves(_exact(dequantize(x), dequantize(gate_up)), "silu", None), dequantize(down))

    x = _fp8(_random(s.G * s.M, s.K, seed=0), "per_row")
    gate_up = _fp8(_random(s.G, 2 * s.N, s.K, seed=1, scale=s.K**-0.5), "per_row")
    down = _fp8(_random(s.G, s.K, s.N, seed=2, scale=s.N**-0.5), "per_row")
    return Problem((x, gate_up, down, _sizes(s)), _ours(ours), layer_fp8_peers(), reference)


def _backward_bf16(case: Case) -> Problem:
    s = case.shape

    def prepare(lhs, rhs, sizes, dout):
        _, pullback = jax.vjp(lambda a, b: _product(a, b, sizes, transpose_rhs=False), lhs, rhs)
        return pullback, dout

    def reference(lhs, rhs, sizes, dout):
        by_group = (s.G, s.M, -1)
        drhs = _dot("gmk,gmn->gkn", lhs.reshape(by_group), dout.reshape(by_group))
        return _exact(dout, rhs), drhs

    weights = _random(s.G, s.K, s.N, seed=1, scale=s.K**-0.5)
    inputs = (_random(s.G * s.M, s.K, seed=0), weights, _sizes(s), _random(s.G * s.M, s.N, seed=2))
    ours = _ours(lambda pullback, dout: pullback(dout), prepare)
    return Problem(inputs, ours, backward_bf16_peers(), reference)


def _permute(case: Case) -> Problem:
    inputs = permute_inputs(case.shape.M, case.shape.K)
    in_xla = Implementation("xla", "jax", "jax", {"": functools.partial(permute, backend="xla")})
    return Problem(inputs, _ours(permute), (in_xla,), lambda x, logits: x.astype(jnp.float32))


def _whole_layer(case: Case) -> Problem:
    s = case.shape
    in_8_bits = case.dtype == "fp8"
    config = MoEConfig(hidden_size=s.K, intermediate_size=s.N, num_experts=s.G, top_k=LAYER_TOP_K)
    inputs = layer_inputs(s.G * s.M // LAYER_TOP_K, s.G, s.K, s.N, in_8_bits, case.calls)
    reference = layers(config, in_8_bits, backend="xla")
    x, weights = inputs
    return Problem(
        inputs,
        _ours(layers(config, in_8_bits)),
        (),
        lambda *inputs: reference(*inputs).astype(jnp.float32),
        # A rounding that falls on the other side may change the choice of experts in the layers that follow.
        checked=(x, weights[:1]),
    )


def _fp8(x: jax.Array, scaling: Scaling) -> QTensor:
    return jax.jit(lambda x: quantize(x, scaling=scaling))(x)


def _exact(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product lhs [G·M, K] · rhs [G, N, K]ᵀ in float32, for groups of equal size."""
    by_group = lhs.reshape(rhs.shape[0], -1, lhs.shape[1])
    return _dot("gmk,gnk->gmn", by_group, rhs).reshape(lhs.shape[0], -1)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


_DECODE = GemmShape(8, 48, 7168, 2048)
_PREFILL = GemmShape(8, 4096, 7168, 4096)

CASES: Mapping[str, Case] = MappingProxyType(
    {
        case.name: case
        for case in (
            Case("decode-fp8", _DECODE, "fp8", Goal("µs", 32, 28.5), _matmul_cost, _matmul_fp8),
            Case("decode-bf16", _DECODE, "bf16", Goal("µs", 60, 56), _matmul_cost, _matmul_bf16),
            Case(
                "many-bf16",
                GemmShape(64, 64, 2048, 1536),
                "bf16",
                Goal("µs", 105, 97),
                _matmul_cost,
                _matmul_bf16,
                "many small experts",
            ),
            Case("prefill-bf16", _PREFILL, "bf16", Goal("TFLOP/s", 725, 760), _matmul_cost, _matmul_bf16),
            Case("prefill-fp8", _PREFILL, "fp8", Goal("TFLOP/s", 1350, 1480), _matmul_cost, _matmul_fp8),
            Case(
                "prefill-fp8-blocks",
                _PREFILL,
                "fp8",
                Goal("TFLOP/s", 1150),
                _matmul_cost,
                _matmul_fp8_blocks,
                "scales 1x128 and 128x128",
            ),
            Case("down-fp8", GemmShape(8, 48, 2048, 7168), "fp8", Goal("µs", 34, 30), _matmul_cost, _matmul_fp8),
            Case(
                "layer-fp8",
                _DECODE,
                "fp8",
                Goal("µs", 95, 86),
                _layer_cost,
                _layer_fp8,
                "gate/up with silu, then down",
                tolerance=5e-2,  # everyone rounds to FP8 in between, in a way of his own
            ),
            Case(
                "backward-bf16",
                _PREFILL,
                "bf16",
                Goal("TFLOP/s", 550, 650),
                _backward_cost,
                _backward_bf16,
                "both gradients",
            ),
            Case(
                "permute-fp16",
                GemmShape(PERMUTE_EXPERTS, 16384, 4096, 4096),
                "bf16",
                Goal("µs", 260, 210),
                _permute_cost,
                _permute,
                "route, pack and combine 16384 tokens, top 2",
            ),
            Case(
                "qwen3-fp8-64",
                GemmShape(128, 4, 2048, 768),
                "fp8",
                Goal("µs", 210, 165),
                _whole_layer_cost,
                _whole_layer,
                "Qwen3-30B-A3B's layer, 64 tokens, wall time",
                clock="wall",
                calls=8,
            ),
            Case(
                "qwen3-bf16-16384",
                GemmShape(128, 1024, 2048, 768),
                "bf16",
                Goal("µs", 2500, 2000),
                _whole_layer_cost,
                _whole_layer,
                "the same, 16384 tokens",
                clock="wall",
                calls=3,
            ),
        )
    }
)

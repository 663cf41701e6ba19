"""The problems that `bench.gpu` measures: inputs, our way and the peers' ways to use them, and the right answer.

Groups have equal numbers of rows, so that the right answer of a product is one batched product in float32. A layer is
timed by the wall clock, in a jitted chain of layers with weights of their own: what the gaps between its kernels cost
counts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.goals import Case, Problem
from bench.hopper.peers import Implementation, backward_bf16_peers, layer_fp8_peers, matmul_bf16_peers, matmul_fp8_peers
from bench.inputs.weights import normal
from bench.model.workloads import GemmShape
from bench.one_chip.dispatch_combine import dispatch_and_combine
from moejax import MoEConfig, Quantization, fused_experts, route
from pallas_kernels.activations import gated_halves
from pallas_kernels.grouped_matmul import Operand, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import QTensor, Scaling, dequantize, quantize

PERMUTE_EXPERTS, PERMUTE_TOP_K = 128, 2
LAYER_TOP_K = 8


def _sizes(shape: GemmShape) -> jax.Array:
    return jnp.full(shape.G, shape.M, jnp.int32)


def _ours(function: Callable[..., Any], prepare: Callable[..., tuple[Any, ...]] | None = None) -> Implementation:
    settings = {} if prepare is None else {"prepare": prepare}
    return Implementation("moejax", "moejax", "jax", {"": function}, **settings)


def _product(lhs: Operand, rhs: Operand, group_sizes: jax.Array, transpose_rhs: bool) -> jax.Array:
    return grouped_matmul(
        lhs, rhs, group_sizes, transpose_rhs=transpose_rhs, preferred_element_type=jnp.bfloat16, backend="pallas_gpu"
    )


def matmul_bf16(case: Case) -> Problem:
    """A product in BF16, weights as [G, K, N]."""
    s = case.shape
    return Problem(
        inputs=(normal(0, (s.G * s.M, s.K)), normal(1, (s.G, s.K, s.N), scale=s.K**-0.5), _sizes(s)),
        ours=_ours(lambda lhs, rhs, sizes: _product(lhs, rhs, sizes, transpose_rhs=False)),
        peers=matmul_bf16_peers(s),
        reference=lambda lhs, rhs, sizes: _exact(lhs, rhs.mT),
    )


def matmul_fp8(
    case: Case,
    lhs_scaling: Scaling = "per_row",
    rhs_scaling: Scaling = "per_row",
    peers: tuple[Implementation, ...] | None = None,
) -> Problem:
    """A product in FP8. Weights lie as [G, N, K], where a scale for each row is one for each output channel."""
    s = case.shape
    lhs = _fp8(normal(0, (s.G * s.M, s.K)), lhs_scaling)
    rhs = _fp8(normal(1, (s.G, s.N, s.K), scale=s.K**-0.5), rhs_scaling)
    return Problem(
        inputs=(lhs, rhs, _sizes(s)),
        ours=_ours(lambda lhs, rhs, sizes: _product(lhs, rhs, sizes, transpose_rhs=True)),
        peers=matmul_fp8_peers() if peers is None else peers,
        reference=lambda lhs, rhs, sizes: _exact(dequantize(lhs), dequantize(rhs)),
    )


def matmul_fp8_blocks(case: Case) -> Problem:
    """The same with DeepSeek's scales, which no peer takes."""
    return matmul_fp8(case, "1x128", "128x128", peers=())


def layer_fp8(case: Case) -> Problem:
    """Gate/up with silu in FP8, then down."""
    s = case.shape

    def ours(x, gate_up, down, sizes):
        h = grouped_gate_up_in_8_bits(x, gate_up, sizes, transpose_rhs=True, backend="pallas_gpu")
        return _product(h, down, sizes, transpose_rhs=True)

    def reference(x, gate_up, down, sizes):
        return _exact(gated_halves(_exact(dequantize(x), dequantize(gate_up)), "silu", None), dequantize(down))

    x = _fp8(normal(0, (s.G * s.M, s.K)), "per_row")
    gate_up = _fp8(normal(1, (s.G, 2 * s.N, s.K), scale=s.K**-0.5), "per_row")
    down = _fp8(normal(2, (s.G, s.K, s.N), scale=s.N**-0.5), "per_row")
    return Problem((x, gate_up, down, _sizes(s)), _ours(ours), layer_fp8_peers(), reference)


def backward_bf16(case: Case) -> Problem:
    """Both gradients of a product in BF16."""
    s = case.shape

    def prepare(lhs, rhs, sizes, dout):
        _, pullback = jax.vjp(lambda a, b: _product(a, b, sizes, transpose_rhs=False), lhs, rhs)
        return pullback, dout

    def reference(lhs, rhs, sizes, dout):
        by_group = (s.G, s.M, -1)
        drhs = _dot("gmk,gmn->gkn", lhs.reshape(by_group), dout.reshape(by_group))
        return _exact(dout, rhs), drhs

    weights = normal(1, (s.G, s.K, s.N), scale=s.K**-0.5)
    inputs = (normal(0, (s.G * s.M, s.K)), weights, _sizes(s), normal(2, (s.G * s.M, s.N)))
    ours = _ours(lambda pullback, dout: pullback(dout), prepare)
    return Problem(inputs, ours, backward_bf16_peers(), reference)


def permute(case: Case) -> Problem:
    """Routing, dispatch and combine without experts between them."""
    inputs = permute_inputs(case.shape.M, case.shape.K)
    in_xla = Implementation("xla", "jax", "jax", {"": functools.partial(route_and_restore, backend="xla")})
    return Problem(inputs, _ours(route_and_restore), (in_xla,), lambda x, logits: x.astype(jnp.float32))


def whole_layer(case: Case) -> Problem:
    """Layers one after the other, router and experts."""
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


@functools.partial(jax.jit, static_argnames="scaling")
def _fp8(x: jax.Array, scaling: Scaling) -> QTensor:
    return quantize(x, scaling=scaling)


def _exact(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product lhs [G·M, K] · rhs [G, N, K]ᵀ in float32, for groups of equal size."""
    by_group = lhs.reshape(rhs.shape[0], -1, lhs.shape[1])
    return _dot("gmk,gnk->gmn", by_group, rhs).reshape(lhs.shape[0], -1)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def permute_inputs(num_tokens: int, hidden: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [T, H] in FP16 and router logits [T, E]."""
    logits = normal(1, (num_tokens, PERMUTE_EXPERTS), dtype=jnp.float32)
    return normal(0, (num_tokens, hidden), dtype=jnp.float16), logits


def route_and_restore(x: jax.Array, logits: jax.Array, *, backend: str = "auto") -> jax.Array:
    """Routes, copies each token to its experts and sums the copies up: x again, as the weights of a token sum to 1."""
    plan_of = functools.partial(make_plan, num_groups=PERMUTE_EXPERTS, backend=backend)
    return dispatch_and_combine(x, logits, PERMUTE_TOP_K, plan_of, backend)[0]


def layer_inputs(
    num_tokens: int, num_experts: int, hidden: int, width: int, in_8_bits: bool, num_layers: int
) -> tuple[Any, ...]:
    """Tokens [T, H] in BF16, and for each layer the router's kernel in BF16, w1 [E, 2I, H] and w2 [E, H, I]."""

    def weights(seed: int, *shape: int) -> Operand:
        drawn = normal(seed, shape, scale=shape[-1] ** -0.5)
        return _fp8(drawn, "128x128") if in_8_bits else drawn

    def one_layer(number: int) -> tuple[Any, ...]:
        seed = 1 + 3 * number
        router = normal(seed, (hidden, num_experts), scale=hidden**-0.5)
        w1 = weights(seed + 1, num_experts, 2 * width, hidden)
        return router, w1, weights(seed + 2, num_experts, hidden, width)

    return normal(0, (num_tokens, hidden)), [one_layer(number) for number in range(num_layers)]


def layers(config: MoEConfig, in_8_bits: bool, backend: str = "auto") -> Callable[..., jax.Array]:
    """A function of (x, weights) that applies the layers one after the other, each with a residual."""
    quantization = Quantization() if in_8_bits else None

    @jax.jit  # lowers one layer for all of them
    def one_layer(x, router, w1, w2):
        routing = route(x, router, config)
        y = fused_experts(x, w1, w2, routing.topk_weights, routing.topk_ids, quantization=quantization, backend=backend)
        return x + y

    def run(x, weights):
        for layer in weights:
            x = one_layer(x, *layer)
        return x

    return run

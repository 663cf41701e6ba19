"""The problems that `bench.gpu` measures: inputs, our way and the peers' ways to use them, and the right answer.

Groups have equal numbers of rows, so that the right answer of a product is one batched product in float32. A layer is
timed by the wall clock, in a jitted chain of layers with weights of their own: what the gaps between its kernels cost
counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.peers import Implementation, backward_bf16_peers, layer_fp8_peers, matmul_bf16_peers, matmul_fp8_peers
from bench.inputs.weights import make_params, normal
from bench.model.shapes import GemmShape
from bench.one_chip.dispatch_combine import dispatch_and_combine
from moejax import MoEConfig, Quantization, fused_experts, get_preset, moe, route, with_changes
from pallas_kernels.activations import gated_halves
from pallas_kernels.grouped_matmul import Operand, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import QTensor, Scaling, dequantize, quantize
from sharding.mesh import make_mesh

PERMUTE_EXPERTS, PERMUTE_TOP_K = 128, 2
LAYER_TOP_K = 8


@dataclasses.dataclass(frozen=True)
class CaseData:
    """A case with its data.

    Attributes:
      inputs: what each implementation's `prepare` takes.
      ours: our implementation.
      peers: the others', whether installed or not.
      reference: the right answer in float32, from the inputs; a tree like each implementation's result.
      calls: how often one run does what is timed by the wall clock, which counts what lies between kernels too; None
        where the kernels are timed.
      checked: the inputs to check results with where those that are timed would not do.
    """

    inputs: tuple[Any, ...]
    ours: Implementation
    peers: tuple[Implementation, ...]
    reference: Callable[..., Any]
    calls: int | None = None
    checked: tuple[Any, ...] | None = None


def _ours(function: Callable[..., Any], **settings: Any) -> Implementation:
    return Implementation("moejax", "moejax", {"": function}, **settings)


def _sizes(shape: GemmShape) -> jax.Array:
    return jnp.full(shape.G, shape.M, jnp.int32)


def _product(lhs: Operand, rhs: Operand, group_sizes: jax.Array, transpose_rhs: bool) -> jax.Array:
    return grouped_matmul(
        lhs, rhs, group_sizes, transpose_rhs=transpose_rhs, preferred_element_type=jnp.bfloat16, backend="pallas_gpu"
    )


def matmul_bf16(s: GemmShape) -> CaseData:
    """A product in BF16, weights as [G, K, N]."""
    return CaseData(
        inputs=(normal(0, (s.G * s.M, s.K)), normal(1, (s.G, s.K, s.N), scale=s.K**-0.5), _sizes(s)),
        ours=_ours(functools.partial(_product, transpose_rhs=False)),
        peers=matmul_bf16_peers(s),
        reference=lambda lhs, rhs, sizes: _exact(lhs, rhs.mT),
    )


def matmul_fp8(
    s: GemmShape,
    lhs_scaling: Scaling = "per_row",
    rhs_scaling: Scaling = "per_row",
    peers: tuple[Implementation, ...] = matmul_fp8_peers(),
) -> CaseData:
    """A product in FP8. Weights lie as [G, N, K], where a scale for each row is one for each output channel.

    No peer takes DeepSeek's scales, "1x128" and "128x128".
    """
    lhs = _fp8(normal(0, (s.G * s.M, s.K)), lhs_scaling)
    rhs = _fp8(normal(1, (s.G, s.N, s.K), scale=s.K**-0.5), rhs_scaling)
    return CaseData(
        inputs=(lhs, rhs, _sizes(s)),
        ours=_ours(functools.partial(_product, transpose_rhs=True)),
        peers=peers,
        reference=lambda lhs, rhs, sizes: _exact(dequantize(lhs), dequantize(rhs)),
    )


def layer_fp8(s: GemmShape) -> CaseData:
    """Gate/up with silu in FP8, then down."""

    def ours(x, gate_up, down, sizes):
        h = grouped_gate_up_in_8_bits(x, gate_up, sizes, transpose_rhs=True, backend="pallas_gpu")
        return _product(h, down, sizes, transpose_rhs=True)

    def reference(x, gate_up, down, sizes):
        return _exact(gated_halves(_exact(dequantize(x), dequantize(gate_up)), "silu", None), dequantize(down))

    x = _fp8(normal(0, (s.G * s.M, s.K)), "per_row")
    gate_up = _fp8(normal(1, (s.G, 2 * s.N, s.K), scale=s.K**-0.5), "per_row")
    down = _fp8(normal(2, (s.G, s.K, s.N), scale=s.N**-0.5), "per_row")
    return CaseData((x, gate_up, down, _sizes(s)), _ours(ours), layer_fp8_peers(), reference)


def backward_bf16(s: GemmShape) -> CaseData:
    """Both gradients of a product in BF16."""

    def prepare(lhs, rhs, sizes, dout):
        _, pullback = jax.vjp(lambda a, b: _product(a, b, sizes, transpose_rhs=False), lhs, rhs)
        return pullback, dout

    def reference(lhs, rhs, sizes, dout):
        by_group = (s.G, s.M, -1)
        drhs = _dot("gmk,gmn->gkn", lhs.reshape(by_group), dout.reshape(by_group))
        return _exact(dout, rhs), drhs

    weights = normal(1, (s.G, s.K, s.N), scale=s.K**-0.5)
    inputs = (normal(0, (s.G * s.M, s.K)), weights, _sizes(s), normal(2, (s.G * s.M, s.N)))
    ours = _ours(lambda pullback, dout: pullback(dout), prepare=prepare)
    return CaseData(inputs, ours, backward_bf16_peers(), reference)


def permute(s: GemmShape) -> CaseData:
    """Routing, dispatch and combine without experts between them, of tokens [T, H] in FP16."""

    def route_and_restore(x, logits, *, backend="auto"):
        """Gives x again, as the weights of a token sum to 1."""
        plan_of = functools.partial(make_plan, num_groups=PERMUTE_EXPERTS, backend=backend)
        return dispatch_and_combine(x, logits, PERMUTE_TOP_K, plan_of, backend)[0]

    logits = normal(1, (s.M, PERMUTE_EXPERTS), dtype=jnp.float32)
    inputs = normal(0, (s.M, s.K), dtype=jnp.float16), logits
    in_xla = Implementation("xla", "jax", {"": functools.partial(route_and_restore, backend="xla")})
    return CaseData(inputs, _ours(route_and_restore), (in_xla,), lambda x, logits: x.astype(jnp.float32))


def whole_layer(
    s: GemmShape, in_8_bits: bool, num_layers: int, num_tokens: int | None = None, num_experts: int | None = None
) -> CaseData:
    """Layers one after the other, router and experts, each with weights of its own and a residual.

    Where tokens are so few that they choose some of the experts only, the groups of the shape are those that they
    choose, and `num_tokens` and `num_experts` are given.
    """
    num_tokens = s.G * s.M // LAYER_TOP_K if num_tokens is None else num_tokens
    num_experts = s.G if num_experts is None else num_experts
    config = MoEConfig(hidden_size=s.K, intermediate_size=s.N, num_experts=num_experts, top_k=LAYER_TOP_K)
    quantization = Quantization() if in_8_bits else None

    def weights_of(seed: int, *shape: int) -> Operand:
        drawn = normal(seed, shape, scale=shape[-1] ** -0.5)
        return _fp8(drawn, "128x128") if in_8_bits else drawn

    def layer_of(seed: int) -> tuple[Any, ...]:
        """The router's kernel in BF16, w1 [E, 2I, H] and w2 [E, H, I]."""
        router = normal(seed, (s.K, num_experts), scale=s.K**-0.5)
        gate_up, down = (num_experts, 2 * s.N, s.K), (num_experts, s.K, s.N)
        return router, weights_of(seed + 1, *gate_up), weights_of(seed + 2, *down)

    @functools.partial(jax.jit, static_argnames="backend")  # lowers one layer for all of them
    def one_layer(x, router, w1, w2, backend):
        routing = route(x, router, config)
        chosen = routing.topk_weights, routing.topk_ids
        return fused_experts(x, w1, w2, *chosen, residual=x, quantization=quantization, backend=backend)

    weights = [layer_of(1 + 3 * number) for number in range(num_layers)]
    return _in_a_row(one_layer, normal(0, (num_tokens, s.K)), weights)


def layer_of_preset(s: GemmShape, preset: str, num_tokens: int, num_layers: int) -> CaseData:
    """The same with the layer of a preset, its weights in 8 bits: biases, activation and rounding are the model's.

    The shape has the groups that the tokens read, and the sizes of a layer.
    """
    config = with_changes(get_preset(preset, precision="w8a8"), hidden_size=s.K, intermediate_size=s.N)
    mesh = make_mesh(1, devices=jax.devices()[:1])

    @functools.partial(jax.jit, static_argnames="backend")
    def one_layer(x, params, backend):
        return moe(x, params, with_changes(config, backend=backend), residual=x)[0]

    weights = [(make_params(config, mesh, seed),) for seed in range(num_layers)]
    return _in_a_row(one_layer, normal(0, (num_tokens, config.hidden_size)), weights)


def _in_a_row(one_layer: Callable[..., jax.Array], x: jax.Array, weights: list[tuple[Any, ...]]) -> CaseData:
    """The problem of layers one after the other, each one_layer(x, *its weights, backend=...) -> x."""

    def layers(x, weights, backend="auto"):
        for layer in weights:
            x = one_layer(x, *layer, backend=backend)
        return x

    return CaseData(
        (x, weights),
        _ours(layers),
        (),
        lambda x, weights: layers(x, weights, backend="xla").astype(jnp.float32),
        calls=len(weights),
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

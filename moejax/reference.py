"""The dense oracle: every expert sees every token, and the router's weights, zero for experts not chosen, sum them.

It shares the router with the layer (which has tests of its own) and nothing else: no plan, no dispatch, no grouped
product, no exchange. All in float32. It cannot drop tokens and needs E times the arithmetic.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import check_config
from moejax.config import MoEConfig
from moejax.params import MoEParams
from moejax.placing import place
from moejax.routers.top_k import route
from pallas_kernels.activations import Activation, gated
from pallas_kernels.grouped_matmul import Operand
from pallas_kernels.quantize import QTensor, Scaling, dequantize, quantize

_FULL = jax.lax.Precision.HIGHEST


def dense_moe(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    quantized: bool = False,
    keeps_pre_activations: bool = False,
    expert_axis: str | tuple[str, ...] | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """What the layer computes when nothing is dropped, by the shortest way.

    Args:
      x: [..., H].
      params: as for `moejax.moe`; QTensors are dequantised.
      config: the layer, with a `TopKRouter`; `precision` and `backend` play no part.
      quantized: round the operands of every product as precision "w8a8" does (gradients pass straight through).
      keeps_pre_activations: round these to `config.dtype`, too, as a layer in 8 bits does where a gradient is asked for
        and its experts' width is a multiple of 128.
      expert_axis: None when `params` hold all experts. Inside shard_map, the axis that they are split over: each chip
        then applies its own to all tokens, and the sums are added up.
      mask: bool [...], true for real tokens; None if all are. The others come out as zeros.

    Returns:
      float32 [..., H].
    """
    check_config(config)
    if params.replicas is not None:
        if expert_axis is not None:
            raise ValueError("params must hold every expert once where they are split over expert_axis: place them so")
        params = place(params, np.arange(config.num_experts))
    tokens = x.reshape(-1, config.hidden_size).astype(jnp.float32)
    if mask is not None:
        tokens = jnp.where(mask.reshape(-1, 1), tokens, 0)
    router = params.router or {}
    routing = route(
        tokens, router["kernel"], config, bias=router.get("bias"), correction_bias=router.get("correction_bias")
    )
    q = config.quantization if quantized else None

    def rows(values: jax.Array) -> jax.Array:
        return values if q is None else _rounded(values, q.dtype, q.lhs_scaling)

    def weights(values: Operand) -> jax.Array:
        if isinstance(values, QTensor):
            return dequantize(values.mT)
        values = values.astype(jnp.float32)
        return values if q is None else _rounded(values, q.dtype, q.rhs_scaling)

    def halves(gate_up: Operand) -> jax.Array:  # gate and up first, each a matrix; rounded as one
        if isinstance(gate_up, QTensor):
            return weights(gate_up)
        joined = weights(gate_up.reshape(*gate_up.shape[:-2], -1))
        return jnp.moveaxis(joined.reshape(gate_up.shape), -2, -3)

    def mlp(
        values: jax.Array,
        gate_up: Operand,
        down: Operand,
        gate_up_bias: jax.Array | None = None,
        down_bias: jax.Array | None = None,
        activation: tuple[Activation, float | None] = (config.activation, config.activation_limit),
    ) -> jax.Array:
        both = jnp.einsum("th,jhi->jti", rows(values), halves(gate_up), precision=_FULL)
        if gate_up_bias is not None:
            both += gate_up_bias[:, None]
        if keeps_pre_activations:
            kept = jnp.finfo(config.dtype)  # a conversion there and back XLA takes for nothing, on a GPU
            said = jax.lax.reduce_precision(both, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)
            both += jax.lax.stop_gradient(said - both)
        h = gated(both[0], both[1], *activation)
        y = jnp.dot(rows(h), weights(down), precision=_FULL)
        return y if down_bias is None else y + down_bias

    inputs, topk_weights = tokens, routing.topk_weights
    if config.scale_inputs:
        inputs, topk_weights = tokens * topk_weights, jnp.ones_like(topk_weights)
    chosen = routing.topk_ids[:, :, None] == jnp.arange(config.num_experts)
    share = jnp.where(chosen, topk_weights[:, :, None], 0).sum(1)
    if expert_axis is not None:
        num_local = params.down.shape[0]
        share = jax.lax.dynamic_slice_in_dim(share, jax.lax.axis_index(expert_axis) * num_local, num_local, axis=1)

    per_expert = {"gate_up": params.gate_up, "down": params.down}
    if params.gate_up_bias is not None:
        per_expert |= {"gate_up_bias": params.gate_up_bias, "down_bias": params.down_bias}

    def add_expert(total, expert):
        expert_share, expert_params = expert
        return total + expert_share[:, None] * mlp(inputs, **expert_params), None

    y, _ = jax.lax.scan(jax.checkpoint(add_expert), jnp.zeros_like(tokens), (share.T, per_expert))
    if expert_axis is not None:
        y = jax.lax.psum(y, expert_axis)
    if params.shared_gate_up is not None:
        shared = mlp(tokens, params.shared_gate_up, params.shared_down, activation=config.of_shared_expert)
        if params.shared_gate is not None:
            shared *= jax.nn.sigmoid(jnp.dot(tokens, params.shared_gate.astype(jnp.float32), precision=_FULL))
        y += shared
    if mask is not None:
        y = jnp.where(mask.reshape(-1, 1), y, 0)
    return y.reshape(x.shape)


def _rounded(x: jax.Array, dtype: str, scaling: Scaling) -> jax.Array:
    """`x` rounded to 8 bits and back, with the gradient of the identity."""
    rounded = dequantize(quantize(jax.lax.stop_gradient(x), dtype, scaling=scaling))
    return x + jax.lax.stop_gradient(rounded - x)

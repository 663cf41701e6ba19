"""The experts of a few tokens in plain XLA: choice by choice."""

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, gated_halves
from pallas_kernels.quantize import QTensor, ToRound, dequantize, quantize, scaling_of_rows
from pallas_kernels.quantize_rows import SCALING


def in_8_bits(x: QTensor | ToRound) -> QTensor:
    """What the kernel multiplies."""
    return quantize(x.array, x.qdtype, scaling=SCALING) if isinstance(x, ToRound) else x


def routed_mlp(
    x: QTensor | ToRound,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    gate_up: QTensor,
    down: QTensor,
    *,
    gate_up_bias: jax.Array | None,
    down_bias: jax.Array | None,
    residual: jax.Array | None,
    activation: Activation,
    activation_limit: float | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `pallas_kernels.routed_mlp.routed_mlp`."""
    if topk_ids.size == 0:
        nothing = jnp.zeros((x.shape[0], down.shape[1]), out_dtype)
        return nothing if residual is None else residual.astype(out_dtype)
    x = in_8_bits(x)
    rows = dequantize(x)

    def of_expert(tensor: QTensor, expert: jax.Array) -> jax.Array:
        scale = tensor.scale[expert if tensor.scale.shape[0] > 1 else 0]
        return dequantize(QTensor(tensor.values[expert], scale))

    def product(row: jax.Array, weights: QTensor, bias: jax.Array | None, expert: jax.Array) -> jax.Array:
        out = jnp.dot(of_expert(weights, expert), row, precision=jax.lax.Precision.HIGHEST)
        return out if bias is None else out + bias[expert].astype(jnp.float32)

    def share(choice: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        token, expert, weight = choice
        is_known = (expert >= 0) & (expert < down.shape[0])
        known = jnp.where(is_known, expert, 0)
        h = gated_halves(product(rows[token], gate_up, gate_up_bias, known), activation, activation_limit)
        h = dequantize(quantize(h[None], x.dtype, scaling=scaling_of_rows(x)))[0]
        return jnp.where(is_known, weight * product(h, down, down_bias, known), 0)

    tokens = jnp.broadcast_to(jnp.arange(x.shape[0])[:, None], topk_ids.shape)
    choices = tokens.reshape(-1), topk_ids.reshape(-1), topk_weights.reshape(-1).astype(jnp.float32)
    shares = jax.lax.map(share, choices).reshape(*topk_ids.shape, down.shape[1])
    y = shares.sum(axis=1)
    return (y if residual is None else y + residual).astype(out_dtype)

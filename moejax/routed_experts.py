"""The routed experts on tokens: through the exchange, or, to be trained on one chip, with their own backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moejax.experts import ExpertMath, ExpertWeights
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import Copied, Rows, ToRound
from pallas_kernels.trained_mlp import Settings, fits, trained_mlp
from sharding.exchange import Way, exchange, sum_of_weighed_rows


def routed_experts(
    math: ExpertMath,
    x: Copied,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    weights: ExpertWeights,
    way: Way,
    *,
    residual: jax.Array | None = None,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """`sharding.exchange.exchange` by experts; for a gradient they weigh rows before down if all of them are here.

    A bias of down is then added to the sum of the rows.

    Args:
      math: of the experts.
      x: [T, H], as `exchange` takes it.
      topk_weights: float32 [T, K].
      topk_ids: int32 [T, K].
      weights: of the experts of this chip.
      way: how rows travel.
      residual: [T, H], what the sum is added to, or None.
      preferred_element_type: of the result.

    Returns:
      [T, H].
    """
    bias, width = weights.down_bias, weights.down.shape[2 if weights.k_major[1] else 1]
    is_elsewhere = way.axes.ep > 1 or (bias is not None and way.axes.tp > 1)
    if is_elsewhere or not (math.trains and fits(math.quantization, width)):
        operands = x, topk_weights, topk_ids, functools.partial(_experts, math), weights.as_multiplied(), way
        return exchange(*operands, residual=residual, preferred_element_type=preferred_element_type)
    assert not isinstance(x, ToRound), "no gradient passes it"
    settings = Settings(
        math.activation,
        math.activation_limit,
        math.quantization,
        weights.k_major,
        jnp.dtype(math.dtype),
        weights.dtype,
    )
    y = sum_of_weighed_rows(
        functools.partial(_trained, settings, math.backend),
        x,
        topk_weights,
        topk_ids,
        dataclasses.replace(weights, down_bias=None),
        way,
        preferred_element_type=preferred_element_type if bias is None and residual is None else jnp.float32,
    )
    if bias is not None:
        y += _weighed_bias(topk_weights, topk_ids, bias)
    return (y if residual is None else y + residual).astype(preferred_element_type)


def _experts(math: ExpertMath, weights: ExpertWeights, rows: Rows, group_sizes: jax.Array) -> jax.Array:
    return math(rows, group_sizes, weights)


@jax.checkpoint
def _weighed_bias(topk_weights: jax.Array, topk_ids: jax.Array, bias: jax.Array) -> jax.Array:
    """Σ_k topk_weights[t, k] · bias[topk_ids[t, k]], float32 [T, H]; nothing of [T, K, E] is kept for a gradient."""
    is_chosen = topk_ids[:, :, None] == jnp.arange(bias.shape[0])
    of_experts = jnp.where(is_chosen, topk_weights[:, :, None], 0).sum(1)
    return jnp.dot(of_experts, bias.astype(jnp.float32), precision="highest")


def _trained(
    settings: Settings,
    backend: str,
    weights: ExpertWeights,
    x: Rows,
    row_weights: jax.Array,
    plan: Plan,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    return trained_mlp(
        x,
        row_weights,
        plan,
        weights.gate_up,
        weights.down,
        gate_up_bias=weights.gate_up_bias,
        settings=settings,
        preferred_element_type=preferred_element_type,
        backend=backend,
    )

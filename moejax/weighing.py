"""Where rows get the weights of their choices: for a gradient before down, if that can be, else after."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.experts import ExpertMath
from pallas_kernels.quantize import Rows
from sharding.exchange import Way, WeighingExperts, exchange, exchange_of_weighed_rows


def exchange_weighed(
    math: ExpertMath,
    x: Rows,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: WeighingExperts,
    params: dict[str, Any],
    way: Way,
    *,
    down_bias: str,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """`sharding.exchange.exchange` by experts that weigh rows before down if `math` says so and they are all here.

    A bias of down is then added to the sum of the rows.

    Args:
      math: of the experts.
      x: [T, H], as `exchange` takes it.
      topk_weights: float32 [T, K].
      topk_ids: int32 [T, K].
      experts: can be called without weights of rows, too.
      params: their parameters by name.
      way: how rows travel.
      down_bias: the name of the bias [L, H] of down, which may be None.
      preferred_element_type: of the result.

    Returns:
      [T, H].
    """
    bias = params[down_bias]
    if not math.can_weigh_rows or way.axes.ep > 1 or (bias is not None and way.axes.tp > 1):
        return exchange(x, topk_weights, topk_ids, experts, params, way, preferred_element_type=preferred_element_type)
    y = exchange_of_weighed_rows(
        x,
        topk_weights,
        topk_ids,
        experts,
        params | {down_bias: None},
        way,
        preferred_element_type=preferred_element_type if bias is None else jnp.float32,
    )
    if bias is None:
        return y
    return (y + _weighed_bias(topk_weights, topk_ids, bias)).astype(preferred_element_type)


@jax.checkpoint
def _weighed_bias(topk_weights: jax.Array, topk_ids: jax.Array, bias: jax.Array) -> jax.Array:
    """Σ_k topk_weights[t, k] · bias[topk_ids[t, k]], float32 [T, H]; nothing of [T, K, E] is kept for a gradient."""
    is_chosen = topk_ids[:, :, None] == jnp.arange(bias.shape[0])
    of_experts = jnp.where(is_chosen, topk_weights[:, :, None], 0).sum(1)
    return jnp.dot(of_experts, bias.astype(jnp.float32), precision="highest")

"""Tokens to their experts and back: one function, and a file for every transport that can carry it out.

Shapes on one chip: T tokens, K choices each, E experts of which L = E / ep are here, H hidden, room for C rows.
Of the seven stages of a token's way, these are the exchange's:

    plan_rows      topk_ids [T, K]   -> which row goes where
    send           [T, H]            -> [C, H], sorted by local expert
    (experts       gate/up and down, two grouped products: what the caller gives)
    give_back      [C, H]            -> the slots from which the rows came
    combine_slots  Σ_k weight · slot -> [T, H], in float32, in a fixed order

Every transport has them as functions of these names (`transport`), and `pick` chooses between transports. `one_chip`,
for chips that hold all experts, folds sending into a gather and giving back into the sum. `dense` carries equal slabs
over `lax.all_to_all`, `exact` just the rows that there are; what they share is in `between_chips`. `hierarchical` is
made of two of these, one across nodes and one within.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import Copied
from sharding.exchange import one_chip
from sharding.exchange.between_chips import LATER_ROUNDS
from sharding.exchange.one_chip import sum_of_weighed_rows
from sharding.exchange.pick import check_transport, pick_transport, transport_name
from sharding.exchange.transport import DISPATCHED_NAME, PLAN_NAME, RETURNED_NAME, Experts, Transport, WeighingExperts
from sharding.exchange.way import Way
from sharding.exchange.wire import Wire


def exchange(
    x: Copied,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    way: Way,
    *,
    residual: jax.Array | None = None,
    preferred_element_type: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](x[t]) for this chip's tokens.

    Args:
      x: [T, H], BF16, FP16 or float32; or a QTensor in which every row has scales of its own, without a gradient, or a
        `Rounded` with such scales: the 8 bits travel as they are, and `experts` get rows of the same kind. Where all
        experts are here, it may be a `ToRound`; they get a QTensor.
      topk_weights: [T, K] float32.
      topk_ids: int32 [T, K], numbers of experts over the whole expert axis; −1 for a choice that is not made.
      experts: applies the L local experts; where their width is split, gives partial sums.
      params: their parameters, a pytree that `experts` understands.
      way: how rows travel.
      residual: [T, H], floating point, what the sum is added to; None for nothing.
      preferred_element_type: dtype of the sum, which is made in float32 all the same.

    Returns:
      [T, H].

    Raises:
      ValueError: `way.transport` is unknown.
    """
    sent: Any = x  # a `ToRound` only where it is copied
    operands = sent, topk_weights, topk_ids, experts, params, way
    if residual is None:
        return pick_transport(way).exchange(*operands, preferred_element_type=preferred_element_type)
    if way.is_on_one_chip:
        return one_chip.exchange(*operands, residual=residual, preferred_element_type=preferred_element_type)
    y = pick_transport(way).exchange(*operands, preferred_element_type=jnp.float32)
    return (y + residual).astype(preferred_element_type)


__all__ = [
    "DISPATCHED_NAME",
    "LATER_ROUNDS",
    "PLAN_NAME",
    "RETURNED_NAME",
    "Experts",
    "Transport",
    "Way",
    "WeighingExperts",
    "Wire",
    "check_transport",
    "exchange",
    "pick_transport",
    "sum_of_weighed_rows",
    "transport_name",
]

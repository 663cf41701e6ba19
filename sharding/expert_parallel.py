"""The body of an expert-parallel MLP: what one chip does inside shard_map, and the same on a single chip.

Shapes on one chip: T tokens, K choices each, E experts of which L = E / ep are here, H hidden.

    plan -> send rows -> experts (two grouped matmuls) -> return rows -> combine

On one chip sending and returning vanish into the gather before the experts and the sum after them. Over several, all
of it goes in rounds (see `sharding.exchange_plan`), whose buffers are sized for a load twice the balanced one.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import Operand, QTensor, Scaling
from sharding.exchange_dense import announce, return_rows, send_rows
from sharding.exchange_plan import (
    count_dropped,
    expert_capacity,
    limit_to_capacity,
    local_experts,
    plan_departure,
    plan_destinations,
    slab_size,
)
from sharding.rounds import sum_over_rounds


class Experts(Protocol):
    """The local experts as a function of rows sorted by expert. Closes over nothing that is traced."""

    def __call__(self, params: Any, rows: Any, group_sizes: jax.Array) -> jax.Array:
        """Rows [R, H] (of the kind of x), group_sizes int32 [L] -> [R, H]; rows past their sum hold no token."""


@dataclasses.dataclass(frozen=True)
class Transport:
    """How rows travel.

    Attributes:
      expert_axis: mesh axis that the experts are split over, or None on a single chip.
      ep: its size.
      token_axes: mesh axes that tokens are split over; all chips of these run the same number of rounds.
      capacity_factor: None keeps every assignment; a number lets an expert take at most
        ⌈capacity_factor · T·K / E⌉ rows of each chip's T tokens, and the rest is dropped and counted.
      wire_scaling: None sends rows in their own dtype, else in FP8 with this scaling.
      backend: of dispatch and combine.
      max_choices: choices that all chips' tokens make together at most, where most of topk_ids are −1; None for T·K a
        chip. It bounds the rows in memory on one chip, and sizes the buffers of an exchange over several.
    """

    expert_axis: str | None = None
    ep: int = 1
    token_axes: tuple[str, ...] = ()
    capacity_factor: float | None = None
    wire_scaling: Scaling | None = None
    backend: str = "auto"
    max_choices: int | None = None


def expert_parallel(
    x: Operand,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    *,
    num_experts: int,
    transport: Transport,
    preferred_element_type: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](x[t]) for this chip's tokens.

    Args:
      x: [T, H], BF16 or float32; on a single chip also a QTensor whose every row has its own scales.
      topk_weights: [T, K] float32.
      topk_ids: integer [T, K], numbers of experts over the whole expert axis; −1 for a choice that is not made.
      experts: applies the L local experts.
      params: their parameters, a pytree that `experts` understands.
      num_experts: E.
      transport: how rows travel.
      preferred_element_type: dtype of the sum, which is made in float32 all the same.

    Returns:
      [T, H], and int32 [E]: of this chip's assignments, how many each expert had no room for.

    Raises:
      ValueError: ep does not divide E.
    """
    num_tokens, top_k = topk_ids.shape
    num_local = local_experts(num_experts, transport.ep)
    capacity = None
    kept_ids = topk_ids
    if transport.capacity_factor is not None:
        capacity = expert_capacity(num_tokens, top_k, num_experts, transport.capacity_factor)
        kept_ids = limit_to_capacity(topk_ids, num_experts, capacity)
    dropped = count_dropped(topk_ids, kept_ids, num_experts)
    if transport.expert_axis is None or transport.ep == 1:
        plan = make_plan(kept_ids, num_experts)
        if transport.max_choices is not None:
            # Rows in use lie first, so that these hold every choice.
            plan = dataclasses.replace(plan, order=plan.order[: transport.max_choices])
        rows = experts(params, dispatch(x, plan, backend=transport.backend), plan.group_sizes)
        y = combine(rows, plan, topk_weights, preferred_element_type=preferred_element_type, backend=transport.backend)
        return y, dropped

    if isinstance(x, QTensor):
        raise ValueError("x must be an array when experts are split over chips; wire_scaling sends its rows in 8 bits")
    axis, backend = transport.expert_axis, transport.backend
    choices = _choices_per_chip(num_tokens * top_k, transport)
    slab, max_rounds = slab_size(num_tokens, top_k, num_local, transport.ep, capacity, choices=choices)

    def one_round(index: jax.Array | int, constants: Any, args: Any) -> jax.Array:
        ids, destinations, by_rank = constants
        x, topk_weights, params = args
        departure, for_experts = plan_departure(ids, destinations, by_rank, num_local, slab, index)
        exchange = announce(departure, for_experts, num_local, axis)
        arrived = send_rows(x, exchange, axis, transport.wire_scaling, backend)
        rows = return_rows(experts(params, arrived, exchange.arrival.group_sizes), exchange, axis, backend)
        return combine(rows, departure, topk_weights, preferred_element_type=jnp.float32, backend=backend)

    destinations, by_rank = plan_destinations(kept_ids, num_local, transport.ep)
    constants, args = (kept_ids, destinations, by_rank), (x, topk_weights, params)
    if max_rounds == 1:
        return one_round(0, constants, args).astype(preferred_element_type), dropped
    rounds = jax.lax.pmax(-(-by_rank.group_sizes.max() // slab), transport.token_axes or axis)
    return sum_over_rounds(one_round, rounds, constants, args).astype(preferred_element_type), dropped


def _choices_per_chip(at_most: int, transport: Transport) -> int:
    """The choices of this chip's tokens that are made, on the average of all chips."""
    if transport.max_choices is None:
        return at_most
    chips = math.prod(jax.lax.axis_size(axis) for axis in transport.token_axes or (transport.expert_axis,))
    return min(at_most, math.ceil(transport.max_choices / chips))

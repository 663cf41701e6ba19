"""The body of an expert-parallel MLP: what one chip does inside shard_map, and the same on a single chip.

Shapes on one chip: T tokens, K choices each, E experts of which L = E / ep are here, H hidden.

    plan -> send rows -> experts (two grouped matmuls) -> return rows -> combine

On one chip sending and returning vanish into the gather before the experts and the sum after them.
"""

import dataclasses
from typing import Protocol

import jax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import Scaling
from sharding.exchange_dense import plan_exchange, return_rows, send_rows
from sharding.exchange_plan import count_dropped, expert_capacity, limit_to_capacity, local_experts, slab_size


class Experts(Protocol):
    """The local experts as a function of rows sorted by expert."""

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Rows [R, H], group_sizes int32 [L] -> [R, H]; rows past the sum of group_sizes hold no token."""


@dataclasses.dataclass(frozen=True)
class Transport:
    """How rows travel.

    Attributes:
      expert_axis: mesh axis that the experts are split over, or None on a single chip.
      ep: its size.
      capacity_factor: None keeps every assignment; a number lets an expert take at most
        ⌈capacity_factor · T·K / E⌉ rows of each chip's T tokens, and the rest is dropped and counted.
      wire_scaling: None sends rows in their own dtype, else in FP8 with this scaling.
      backend: of dispatch and combine.
    """

    expert_axis: str | None = None
    ep: int = 1
    capacity_factor: float | None = None
    wire_scaling: Scaling | None = None
    backend: str = "auto"


def expert_parallel(
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    *,
    num_experts: int,
    transport: Transport,
) -> tuple[jax.Array, jax.Array]:
    """Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](x[t]) for this chip's tokens.

    Args:
      x: [T, H], BF16 or float32.
      topk_weights: [T, K] float32.
      topk_ids: integer [T, K], numbers of experts over the whole expert axis; −1 for a choice that is not made.
      experts: applies the L local experts.
      num_experts: E.
      transport: how rows travel.

    Returns:
      [T, H] in the dtype of `x`, and int32 [E]: of this chip's assignments, how many each expert had no room for.

    Raises:
      ValueError: ep does not divide E.
    """
    num_tokens, top_k = topk_ids.shape
    num_local = local_experts(num_experts, transport.ep)
    backend = transport.backend
    capacity = None
    kept_ids = topk_ids
    if transport.capacity_factor is not None:
        capacity = expert_capacity(num_tokens, top_k, num_experts, transport.capacity_factor)
        kept_ids = limit_to_capacity(topk_ids, num_experts, capacity)

    if transport.expert_axis is None or transport.ep == 1:
        plan = make_plan(kept_ids, num_experts)
        rows = experts(dispatch(x, plan, backend=backend), plan.group_sizes)
    else:
        axis = transport.expert_axis
        slab = slab_size(num_tokens, top_k, num_local, capacity)
        exchange = plan_exchange(kept_ids, num_local, slab, axis)
        arrived = send_rows(x, exchange, axis, transport.wire_scaling, backend)
        rows = return_rows(experts(arrived, exchange.arrival.group_sizes), exchange, axis, backend)
        plan = exchange.departure
    return combine(rows, plan, topk_weights, backend=backend), count_dropped(topk_ids, plan, num_experts)

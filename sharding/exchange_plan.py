"""Who sends which assignment where: sizes, slots and drops, before any row moves.

Rank r of the expert axis holds the experts [r·L, (r+1)·L), L = E / ep. Each rank gives every peer a slab of S slots;
an assignment takes the next free slot of the slab that goes to its expert's rank. Slabs have one size, so that the
exchange has static shapes: S is the most that one rank can ever send to another, or less where a capacity bounds it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan, make_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """The plan of one exchange, as one rank sees it.

    Attributes:
      departure: [T, K] assignments -> [ep·S] slots, grouped by destination rank.
      arrival: the [ep·S, 1] slots that peers filled -> [ep·S] rows, grouped by local expert (G = L).
    """

    departure: Plan
    arrival: Plan


def local_experts(num_experts: int, ep: int) -> int:
    """L = E / ep.

    Raises:
      ValueError: `ep` does not divide `num_experts`.
    """
    if num_experts % ep:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"num_experts={num_experts} is not divisible by ep={ep}; choose ep among {', '.join(map(str, divisors))}"
        )
    return num_experts // ep


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Rows that an expert takes from one rank's T tokens: ⌈capacity_factor · T·K / E⌉, at least 1 (GShard, Switch)."""
    return max(1, math.ceil(capacity_factor * num_tokens * top_k / num_experts))


def limit_to_capacity(topk_ids: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """Takes from each expert what exceeds its capacity.

    First choices have precedence over second ones, and so on; among equals the earlier token has.

    Returns:
      topk_ids [T, K] with −1 for each dropped assignment.
    """
    plan = make_plan(topk_ids, num_experts, capacity=capacity)
    return jnp.where(plan.inverse < 0, -1, topk_ids)


def count_dropped(topk_ids: jax.Array, plan: Plan, num_experts: int) -> jax.Array:
    """int32 [E]: how many assignments to each expert `plan`, the one that moves rows, has no row for."""
    lost = (plan.inverse < 0)[..., None] & (topk_ids[..., None] == jnp.arange(num_experts))
    return lost.sum((0, 1), dtype=jnp.int32)


def slab_size(num_tokens: int, top_k: int, num_local_experts: int, capacity: int | None) -> int:
    """S: the most rows that one rank can send to another.

    A token has at most min(K, L) experts on one rank; with a capacity, an expert takes no more than that.
    """
    worst = num_tokens * min(top_k, num_local_experts)
    return worst if capacity is None else min(worst, num_local_experts * capacity)


def plan_departure(topk_ids: jax.Array, num_local_experts: int, ep: int, slab: int) -> tuple[Plan, jax.Array]:
    """The slots of this rank's assignments, and what its peers must know of them.

    Returns:
      The plan of [T, K] assignments into [ep·S] slots, and int32 [ep·S]: the local expert that the row in each slot
      is for, −1 in an empty slot. With `slab_size` slots nothing is dropped.
    """
    destination = jnp.where(topk_ids >= 0, topk_ids // num_local_experts, -1)
    departure = make_plan(destination, ep, capacity=slab)
    expert = topk_ids.reshape(-1)[jnp.maximum(departure.order, 0)] % num_local_experts
    return departure, jnp.where(departure.order >= 0, expert, -1)


def plan_arrival(experts: jax.Array, num_local_experts: int) -> Plan:
    """The rows that arrived, sorted by local expert; `experts` is int32 [ep·S] as the peers announced it."""
    return make_plan(experts[:, None], num_local_experts)

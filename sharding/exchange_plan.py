"""Who sends which assignment where: sizes and slots, before any row moves.

Rank r of the expert axis holds the experts [r·L, (r+1)·L), L = E / ep. An exchange gives each rank a slab of S slots
for every peer. Slabs have one size, so that shapes are static, and the load has not: an exchange therefore goes in
rounds, as many as the fullest pair of ranks needs, and nothing is dropped however uneven the load is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan, make_plan, take_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """The plan of one round of an exchange, as one rank sees it.

    Attributes:
      departure: [T, K] assignments -> [ep·S] slots, grouped by destination rank.
      arrival: the [ep·S, 1] slots that peers filled -> [ep·S] rows, grouped by local expert (G = L).
    """

    departure: Plan
    arrival: Plan


def local_experts(num_experts: int, ep: int) -> int:
    """L = E / ep.

    Raises:
      ValueError: `ep` is not positive or does not divide `num_experts`.
    """
    if ep < 1:
        raise ValueError(f"ep must be at least 1, got {ep}")
    if num_experts % ep:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"num_experts={num_experts} is not divisible by ep={ep}; choose ep among {', '.join(map(str, divisors))}"
        )
    return num_experts // ep


def slab_size(
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    ep: int,
    max_rows: int | None,
    *,
    choices: int | None = None,
) -> tuple[int, int]:
    """S, the rows that one rank can send to another in a round; and the most rounds that any load can need.

    A slab holds twice the rows of a balanced load, in multiples of 8. Where that is not far from all that one rank
    could ever have for another, it holds all of it and one round will do. A balanced load is T·K choices, or `choices`
    where many of the T·K are not made. An expert gets at most `max_rows` from one rank, if that is not None.
    """
    worst = num_tokens * top_k
    if max_rows is not None:
        worst = min(worst, num_local_experts * max_rows)
    balanced = num_tokens * top_k if choices is None else choices
    twice_balanced = 8 * math.ceil(2 * balanced / ep / 8)
    if worst <= 2 * twice_balanced:
        return worst, 1
    return twice_balanced, math.ceil(worst / twice_balanced)


def plan_destinations(topk_ids: jax.Array, num_local_experts: int, ep: int) -> tuple[jax.Array, Plan]:
    """The rank of each assignment's expert, int32 [T, K] (−1 for none), and the tight plan by rank."""
    destinations = jnp.where(topk_ids >= 0, topk_ids // num_local_experts, -1)
    return destinations, make_plan(destinations, ep)


def plan_departure(
    topk_ids: jax.Array,
    destinations: jax.Array,
    by_rank: Plan,
    num_local_experts: int,
    slab: int,
    round_index: jax.Array | int,
) -> tuple[Plan, jax.Array]:
    """The slots of the assignments that leave in one round, and what the peers must know of them.

    Returns:
      The plan of [T, K] assignments into [ep·S] slots, and int32 [ep·S]: the local expert that the row in each slot
      is for, −1 in an empty slot.
    """
    departure = take_slots(by_rank, destinations, slab, begin=round_index * slab)
    expert = topk_ids.reshape(-1)[jnp.maximum(departure.order, 0)] % num_local_experts
    return departure, jnp.where(departure.order >= 0, expert, -1)


def plan_arrival(experts: jax.Array, num_local_experts: int) -> Plan:
    """The rows that arrived, sorted by local expert; `experts` is int32 [ep·S] as the peers announced it."""
    return make_plan(experts[:, None], num_local_experts)

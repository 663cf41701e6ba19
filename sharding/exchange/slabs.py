"""Who sends which choice where, in slabs of equal size: the slots of each rank's rows, before any row moves.

Each rank has a slab of S slots for every peer. What does not fit leaves in a later round. Where chips share the width
of the experts, T counts the tokens of all of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan, make_plan, take_slots
from sharding.placement import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedByRank:
    """The choices of a chip's tokens, by where they go.

    Attributes:
      topk_ids: int32 [T, K], as the tokens chose.
      ranks: int32 [T, K], which rank holds the expert of each; −1 for a choice that is not made.
      by_rank: the tight plan of the choices, grouped by rank.
    """

    topk_ids: jax.Array
    ranks: jax.Array
    by_rank: Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlabPlan:
    """The plan of one round of an exchange, as one rank sees it.

    Attributes:
      departure: [T, K] choices -> [ep·S] slots, grouped by destination rank.
      arrival: the [ep·S, 1] slots that peers filled -> [ep·S] rows, grouped by local expert (G = L).
    """

    departure: Plan
    arrival: Plan

    @property
    def group_sizes(self) -> jax.Array:
        """int32 [L], the rows that arrive for each local expert."""
        return self.arrival.group_sizes


def sort_by_rank(topk_ids: jax.Array, placement: Placement, *, backend: str = "auto") -> SortedByRank:
    """The choices int32 [T, K] by the rank of their experts."""
    ranks = placement.rank(topk_ids)
    return SortedByRank(topk_ids, ranks, make_plan(ranks, placement.ep, backend=backend))


def plan_departure(
    choices: SortedByRank, placement: Placement, slab: int, round_index: jax.Array | int
) -> tuple[Plan, jax.Array]:
    """The slots of the choices that leave in one round, and what the peers must know of them.

    Returns:
      The plan of [T, K] choices into [ep·S] slots, and int32 [ep·S]: the local expert that the row in each slot
      is for, −1 in an empty slot.
    """
    departure = take_slots(choices.by_rank, choices.ranks, slab, begin=round_index * slab)
    expert = placement.slot(choices.topk_ids.reshape(-1)[jnp.maximum(departure.order, 0)])
    return departure, jnp.where(departure.order >= 0, expert, -1)


def plan_arrival(experts: jax.Array, placement: Placement, *, backend: str = "auto") -> Plan:
    """The rows that arrived, sorted by local expert; `experts` is int32 [ep·S] as the peers announced it."""
    return make_plan(experts[:, None], placement.num_local, backend=backend)

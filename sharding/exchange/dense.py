"""The exchange over `lax.all_to_all`: equal slabs to every peer, filled or not, rows out as they are or in 8 bits.

Runs wherever XLA runs. It takes as many rounds as the fullest pair of chips needs.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.custom_derivatives import linear_call

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize import Operand, QTensor, moved_in_8_bits
from sharding.collectives import as_bytes
from sharding.exchange.between_chips import BetweenChips
from sharding.exchange.slabs import SlabPlan, SortedByRank, plan_arrival, plan_departure, sort_by_rank
from sharding.exchange.way import Way


@dataclasses.dataclass(frozen=True)
class Dense(BetweenChips):
    """See `sharding.exchange.between_chips.BetweenChips`."""

    def prepare(self, topk_ids: jax.Array, way: Way) -> SortedByRank:
        """The choices by the rank that holds their experts."""
        return sort_by_rank(topk_ids, way.placement, backend=way.backend)

    def rounds_of(self, choices: SortedByRank, slab: int, way: Way) -> jax.Array:
        """Those for the fullest of the slabs that leave here."""
        del way
        return -(-choices.by_rank.group_sizes.max() // slab)

    def plan_round(self, choices: SortedByRank, slab: int, index: jax.Array | int, way: Way) -> SlabPlan:
        """What leaves, in slabs of S rows; peers tell each other what for, and so learn what arrives."""
        departure, for_experts = plan_departure(choices, way.placement, slab, index)
        arrived = _all_to_all(for_experts, way.axes.expert)
        return SlabPlan(departure, plan_arrival(arrived, way.placement, backend=way.backend))

    def carry[Kind: Operand](self, x: Kind, plan: SlabPlan, way: Way) -> Kind:
        """Tokens [T, H] in slabs to every peer -> the rows of every peer's, [ep·S, H], sorted by local expert."""
        slabs = _exchange_slabs(dispatch(x, plan.departure, backend=way.backend), way)
        return dispatch(slabs, plan.arrival, backend=way.backend)

    def carry_back(self, rows: jax.Array, plan: SlabPlan, way: Way) -> jax.Array:
        """[ep·S, H] by local expert -> the slabs that left."""
        return _exchange_slabs(combine(rows, plan.arrival, backend=way.backend), way)


def _exchange_slabs[Kind: Operand](slabs: Kind, way: Way) -> Kind:
    """Slab d to chip d, and its slab for this one back; gradients travel in `way.cotangent_dtype`."""

    def move(leaf: jax.Array) -> jax.Array:
        return _all_to_all(leaf, way.axes.expert)

    dtype = way.cotangent_dtype
    if dtype is None or isinstance(slabs, QTensor):
        return jax.tree.map(move, slabs)

    def transpose(_: tuple[()], cotangent: jax.Array) -> jax.Array:
        return moved_in_8_bits(functools.partial(jax.tree.map, move), dtype, cotangent)

    return linear_call(lambda _, slabs: move(slabs), transpose, (), slabs)


def _all_to_all(slots: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """Slab d of [ep·S, …] goes to rank d; slab s of the result came from rank s."""
    return as_bytes(lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True), slots)

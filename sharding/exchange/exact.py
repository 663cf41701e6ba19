"""The exchange of as many rows as there are, each to its final place among the receiver's rows.

First the chips tell each other how many rows they have for every expert: counts [ep, E], one small message. From these
every chip knows where each of its rows belongs in the order of the chip that gets it, by local expert, then by sender,
then by token. So rows land sorted, nothing is padded, and nothing is copied a second time:

    sender         rows for   e0 e0 e1 | e2 e3 e3       by expert, and so by chip
                               │  │  │    ╲  ╲  ╲
    chip of e0, e1   e0 … e0 e0 … e1 …     ╲  ╲  ╲      a block of rows for each pair of sender and expert
    chip of e2, e3                 e2 … e2 … e3 e3 …

GPUs store row by row, and know of each where it belongs: where one round carries everything, a single kernel takes the
place of the message and the sums over it, and rows come back to the choices themselves (see `Exact.plan_rows`).

A chip has room for R rows. If it is sent more, round i carries those whose places are i·R … (i + 1)·R − 1, which every
chip knows from the counts. The kernels of `pallas_kernels.all_to_all` carry the blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.all_to_all import Blocks, Routes, all_to_all, make_routes
from pallas_kernels.all_to_all.places import first_places
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan, make_plan, unsorted_plan
from pallas_kernels.quantize import Operand
from pallas_kernels.tracing.running_sums import running_sums
from pallas_kernels.tracing.target import target_platform
from sharding.exchange.between_chips import BetweenChips, RoundPlan
from sharding.exchange.room import bounded, slab_and_rounds
from sharding.exchange.way import Way
from sharding.placement import Placement
from sharding.tensor_parallel import gather_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
    """The choices of a chip's tokens by expert, and how many all chips of the group have.

    Attributes:
      topk_ids: int32 [T, K], as the tokens chose.
      by_expert: the tight plan of the choices, grouped by expert (G = E).
      counts: int32 [ep, E], choices of each chip for each expert.
      places: int32 [ep, E], from `first_places`.
      rank: int32 [], of this chip.
    """

    topk_ids: jax.Array
    by_expert: Plan
    counts: jax.Array
    places: jax.Array
    rank: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExactPlan:
    """The plan of one round, as one chip sees it.

    Attributes:
      departure: [T, K] choices -> [T·K] rows, by expert, or one for each choice; those of other rounds are nobody's.
      blocks: of rows, L for each peer; on GPUs, where one round is all, the routes of single rows.
      group_sizes: int32 [L], the rows that arrive for each local expert.
      num_rows: R.
    """

    departure: Plan
    blocks: Blocks | Routes
    group_sizes: jax.Array
    num_rows: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Exact(BetweenChips):
    """See `sharding.exchange.between_chips.BetweenChips`.

    Attributes:
      backend: of `pallas_kernels.all_to_all`.
    """

    backend: str

    def plan_rows(self, topk_ids: jax.Array, way: Way) -> RoundPlan:
        """See `BetweenChips`. For GPUs, one kernel plans the only round; elsewhere such a plan has its reference."""
        slab, max_rounds = slab_and_rounds(topk_ids.shape, way)
        if max_rounds > 1 or self.backend == "xla" or target_platform() != "gpu":
            return super().plan_rows(topk_ids, way)
        topk_ids = gather_tokens(topk_ids, way.columns_over)
        by_expert, num_rows = _by_expert(topk_ids, way), way.axes.ep * slab
        routes, sizes = make_routes(topk_ids, by_expert, num_rows, way.axes.expert, backend=self.backend)
        has_row = by_expert.inverse >= 0
        return ExactPlan(unsorted_plan(jnp.where(has_row, topk_ids, -1)), routes, sizes, num_rows)

    def prepare(self, topk_ids: jax.Array, way: Way) -> Counted:
        """The choices by expert, and everyone's counts."""
        by_expert = _by_expert(topk_ids, way)
        counts = lax.all_gather(by_expert.group_sizes, way.axes.expert)
        places = first_places(counts, way.placement.num_local)
        return Counted(topk_ids, by_expert, counts, places, lax.axis_index(way.axes.expert))

    def rounds_of(self, choices: Counted, slab: int, way: Way) -> jax.Array:
        """Those for the chip that is sent most."""
        sent_to = choices.counts.sum(0).reshape(way.axes.ep, -1).sum(1)
        return -(-sent_to.max() // (way.axes.ep * slab))

    def plan_round(self, choices: Counted, slab: int, index: jax.Array | int, way: Way) -> ExactPlan:
        """What leaves and arrives in a round, without another message."""
        room = way.axes.ep * slab
        blocks = blocks_between(choices.counts, choices.places, choices.rank, index * room, room, way.placement)
        departure = choices.by_expert
        if room < way.axes.ep * choices.topk_ids.size:
            departure = _those_of_round(choices, index * room, room)
        return ExactPlan(departure, blocks, blocks.recv_sizes.sum(0, dtype=jnp.int32), room)

    def carry[Kind: Operand](self, x: Kind, plan: ExactPlan, way: Way) -> Kind:
        """Tokens [T, H] -> the rows that arrive, [R, H], where they belong."""
        if self.backend == "xla":  # whose collective needs the rows in memory: copied there by the way's kernel
            return self._move(dispatch(x, plan.departure, backend=way.backend), plan.blocks, plan.num_rows, way)
        return self._move(x, plan.blocks, plan.num_rows, way, plan.departure)

    def carry_back(self, rows: jax.Array, plan: ExactPlan, way: Way) -> jax.Array:
        """[R, H] -> [T·K, H], where they were."""
        return self._move(rows, plan.blocks.back, plan.departure.order.shape[0], way)

    def _move[Kind: Operand](
        self, rows: Kind, blocks: Blocks | Routes, num_rows: int, way: Way, departure: Plan | None = None
    ) -> Kind:
        """`all_to_all` of the rows, or of tokens by the plan of their departure."""
        axes, cotangent_dtype = way.axes.expert, way.cotangent_dtype
        return all_to_all(
            rows, blocks, num_rows, axes, plan=departure, cotangent_dtype=cotangent_dtype, backend=self.backend
        )


def _by_expert(topk_ids: jax.Array, way: Way) -> Plan:
    """The choices by expert; of more than the bound of a way, the first."""
    plan = make_plan(topk_ids, way.placement.num_experts, backend=way.backend)
    if way.counted_choices is None:
        return plan
    plan = bounded(plan, way)
    held = jnp.clip(plan.order.shape[0] - plan.offsets, 0, plan.group_sizes)
    return dataclasses.replace(plan, group_sizes=held)


def blocks_between(
    counts: jax.Array, places: jax.Array, rank: jax.Array, begin: jax.Array | int, room: int, placement: Placement
) -> Blocks:
    """The blocks of the rows whose places are in [begin, begin + room).

    Args:
      counts: int32 [ep, E], rows of each chip for each expert.
      places: from `first_places`.
      rank: int32 [], of this chip.
      begin: int32 [].
      room: rows that a chip has room for.
      placement: of the experts.
    """
    first = jnp.clip(places, begin, begin + room)
    sizes = jnp.clip(places + counts, begin, begin + room) - first
    sources = running_sums(counts, axis=1) - counts + first - places
    tables = [table.astype(jnp.int32) for table in (sizes, sources, first - begin)]  # [ep, E]
    by_rank = [table.reshape(placement.ep, placement.ep, placement.num_local) for table in tables]
    from_here = [table[rank] for table in by_rank]
    to_here = [table[:, rank] for table in by_rank]
    return Blocks(*from_here, *to_here)


def _those_of_round(choices: Counted, begin: jax.Array | int, room: int) -> Plan:
    """The plan of the choices by expert, in which those whose place is not in [begin, begin + room) have no row."""
    plan, places = choices.by_expert, choices.places[choices.rank]
    ids = jnp.clip(choices.topk_ids, 0, places.shape[0] - 1)
    place = places[ids] + plan.inverse - plan.offsets[ids]
    is_now = (plan.inverse >= 0) & (place >= begin) & (place < begin + room)
    leaves_now = (plan.order >= 0) & is_now.reshape(-1)[jnp.maximum(plan.order, 0)]
    return dataclasses.replace(
        plan, order=jnp.where(leaves_now, plan.order, -1), inverse=jnp.where(is_now, plan.inverse, -1)
    )

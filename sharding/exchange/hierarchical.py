"""The exchange in two hops, for experts split over nodes and over the chips of each: a token enters a node once.

The first of the expert axes crosses nodes, over the slow network; the others are inside a node. Of the K choices of a
token several may be on one node. Its row still goes there once, to the chip of the same place, and from that chip to
those of its experts:

    chip (n, l)   x, ids, weights  ── across ──►  chip (m, l)  ── within ──►  chips (m, ·) of the experts
                  y = Σ_m sum_m    ◄── across ──  sum_m        ◄── within ──  what the experts made of the row

So it is two exchanges. The outer one takes nodes for experts, and a token chooses each node that holds one of its
experts, in ascending order. What a node makes of a row is the inner exchange: of the rows that came, by the ids and
weights that came beside them, with the real experts. A node adds its own terms in float32, in the order of k, and the
sum travels in the dtype of the experts' rows; the token's chip adds the sums of its nodes in float32, in the order of
the nodes.

Rows that travel in 8 bits are rounded once, before the first hop. Either exchange goes in as many rounds as it needs:
a round of the outer one holds all rounds of the inner one for the rows that it brings. Chips that share the width of
the experts (`way.columns_over`) do so within a node; across nodes each sends the rows of its own tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import QTensor, Rounded, Rows
from sharding.exchange.between_chips import BetweenChips, result_dtype
from sharding.exchange.parcel import Parcel
from sharding.exchange.room import slab_and_rounds, usual_choices
from sharding.exchange.transport import Experts
from sharding.exchange.way import Way
from sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class Hops:
    """The ways of the two exchanges of a chip's [T, K] choices.

    Attributes:
      across: between chips of the same place in every node.
      within: between the chips of a node.
      slots: nodes that a token can choose, min(K, nodes).
      rows: those that a chip has room for across, in a round.
    """

    across: Way
    within: Way
    slots: int
    rows: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoPlans:
    """The plans of one round of both exchanges.

    Attributes:
      across: of T tokens and the nodes that each chooses.
      within: of the rows that came across, and the experts of this node that each is for.
      shape: [T, K], of the choices.
    """

    across: Any
    within: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def group_sizes(self) -> jax.Array:
        """int32 [L], the rows that arrive for each local expert."""
        return self.within.group_sizes


@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """A transport (see `sharding.exchange.transport.Transport`) that is made of two.

    As stages, a round is the first of both exchanges. `give_back` takes rows back within the node; adding them there,
    for which the weights cross first, and bringing the sums home is `combine_slots`.

    Attributes:
      outer: the transport across nodes.
      inner: the one within a node.
    """

    outer: BetweenChips
    inner: BetweenChips

    def exchange(
        self,
        x: Rows,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        experts: Experts,
        params: Any,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """See `sharding.exchange.exchange`.

        Raises:
          ValueError: experts are split over a single axis.
        """
        hops = self.hops(topk_ids.shape, way)
        nodes = chosen_nodes(topk_ids, way.placement.num_experts, hops)
        beside = jnp.concatenate([topk_ids.astype(jnp.float32), topk_weights], 1)
        travels = _as_it_travels(x, way)
        if travels is not x:
            experts = functools.partial(_on_arrays, experts)
        return self.outer.exchange(
            Parcel(travels, beside),
            jnp.ones(nodes.shape, jnp.float32),
            nodes,
            _Node(self.inner, experts, hops),
            params,
            hops.across,
            preferred_element_type=preferred_element_type,
        )

    def rows_held(self, num_tokens: int, top_k: int, way: Way) -> int:
        """See `Transport`."""
        hops = self.hops((num_tokens, top_k), way)
        return self.inner.rows_held(hops.rows, top_k, hops.within)

    def plan_rows(self, topk_ids: jax.Array, way: Way) -> TwoPlans:
        """The plan of the first round, for which the ids of the rows that come across have to come first."""
        hops = self.hops(topk_ids.shape, way)
        nodes = chosen_nodes(topk_ids, way.placement.num_experts, hops)
        across = self.outer.plan_rows(nodes, hops.across)
        ids = self.outer.send_beside(topk_ids.astype(jnp.float32), across, hops.across)
        within = self.inner.plan_rows(ids_here(ids, across.group_sizes, hops), hops.within)
        return TwoPlans(across, within, topk_ids.shape)

    def send(self, x: Rows, plan: TwoPlans, way: Way) -> Rows:
        """[T, H] -> [C, H], sorted by local expert, in two hops."""
        hops = self.hops(plan.shape, way)
        travels = _as_it_travels(x, way)
        arrived = self.outer.send(travels, plan.across, hops.across)
        rows = self.inner.send(arrived, plan.within, hops.within)
        return rows if travels is x else rows.array

    def give_back(self, rows: jax.Array, plan: TwoPlans, way: Way) -> jax.Array:
        """[C, H] -> the slots from which the rows left within the node."""
        return self.inner.give_back(rows, plan.within, self.hops(plan.shape, way).within)

    def combine_slots(
        self,
        slots: jax.Array,
        plan: TwoPlans,
        topk_weights: jax.Array,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """Slots on the nodes -> their sums there -> the sums of those, [T, H], on the tokens' own chips."""
        hops = self.hops(plan.shape, way)
        weights = self.outer.send_beside(topk_weights, plan.across, hops.across)
        sums = self.inner.combine_slots(slots, plan.within, weights, hops.within, preferred_element_type=slots.dtype)
        return self.outer.combine_slots(
            self.outer.give_back(sums, plan.across, hops.across),
            plan.across,
            jnp.ones((len(topk_weights), hops.slots), jnp.float32),
            hops.across,
            preferred_element_type=preferred_element_type,
        )

    def hops(self, shape: tuple[int, ...], way: Way) -> Hops:
        """The two ways of [T, K] choices.

        A token chooses a node once, so that a node gets no more than T rows of a chip. Over an average load as many
        choices as a chip sends come to it, however many rows they are on: the inner exchange has room for twice that.

        Raises:
          ValueError: experts are split over a single axis.
        """
        axes, (num_tokens, top_k) = way.axes, shape
        if len(axes.expert) < 2:
            raise ValueError(
                "transport 'hierarchical' needs two axes for the experts, that of nodes and that of the chips in a "
                f"node, and they are split over {axes.expert} alone; pass partition=Partition(expert=('node', "
                "'local')) with two axes of the mesh, or another transport"
            )
        node, local = axes.expert[:1], axes.expert[1:]
        nodes, num_experts = axes.size(node), way.placement.num_experts
        max_rows = num_tokens if way.max_rows is None else min(num_tokens, num_experts // nodes * way.max_rows)
        across = dataclasses.replace(
            way,
            placement=Placement(nodes, nodes),
            axes=dataclasses.replace(axes, expert=node, mlp=()),
            max_rows=max_rows,
            slab=None if way.slab is None else min(way.slab, num_tokens),
        )
        slots = min(top_k, nodes)
        rows = self.outer.rows_held(num_tokens, slots, across)
        within = dataclasses.replace(
            way,
            placement=Placement(num_experts // nodes, axes.size(local)),
            axes=dataclasses.replace(axes, expert=local),
            max_rows=None if way.max_rows is None else nodes * way.max_rows,
        )
        slab, _ = slab_and_rounds((rows, top_k), within, choices=usual_choices(shape, way))
        return Hops(across, dataclasses.replace(within, slab=slab), slots, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """A node as the expert of the outer exchange: the inner exchange of the rows that came."""

    inner: BetweenChips
    experts: Experts
    hops: Hops

    def __call__(self, params: Any, rows: Parcel, group_sizes: jax.Array) -> jax.Array:
        """Rows [C, H], beside them ids and weights [C, 2K] -> their sums [C, H], in the dtype that the experts give."""
        ids, weights = jnp.split(rows.beside, 2, axis=1)
        return self.inner.exchange(
            rows.rows,
            weights,
            ids_here(ids, group_sizes, self.hops),
            self.experts,
            params,
            self.hops.within,
            preferred_element_type=result_dtype(self.experts, params, rows.rows, self.hops.within),
        )


def _as_it_travels(x: Rows, way: Way) -> Rows:
    """What is rounded for the wire is rounded before the first hop, and not again before the second."""
    if way.wire is None or isinstance(x, QTensor | Rounded):
        return x
    return way.wire.rounded(x, backend=way.backend)


def _on_arrays(experts: Experts, params: Any, rows: Rounded, group_sizes: jax.Array) -> jax.Array:
    """The experts, where only the wire rounds rows."""
    return experts(params, rows.array, group_sizes)


def chosen_nodes(topk_ids: jax.Array, num_experts: int, hops: Hops) -> jax.Array:
    """The nodes of each token's choices, int32 [T, slots]: each once, in ascending order, then −1.

    Four nodes of two experts, K = 3: choices [5, 0, 4] are on nodes [2, 0, 2], and give [0, 2, −1].
    """
    nodes = hops.across.placement.ep
    of_choices = Placement(num_experts, nodes).rank(topk_ids)
    node = jnp.arange(nodes, dtype=jnp.int32)
    is_chosen = (of_choices[:, :, None] == node).any(1)
    chosen = jnp.sort(jnp.where(is_chosen, node, nodes), axis=1)[:, : hops.slots]
    return jnp.where(chosen < nodes, chosen, -1)


def ids_here(ids: jax.Array, group_sizes: jax.Array, hops: Hops) -> jax.Array:
    """Experts' numbers on this node, int32 [rows, K]; −1 for a choice on another, and past the rows that came.

    Args:
      ids: float32 [rows, K], numbers over all nodes.
      group_sizes: int32 [1], the rows that came.
      hops: the ways.
    """
    num_experts = hops.within.placement.num_experts
    first = jax.lax.axis_index(hops.across.axes.expert) * num_experts
    here = ids.astype(jnp.int32) - first
    came = jnp.arange(ids.shape[0])[:, None] < group_sizes.sum()
    return jnp.where(came & (here >= 0) & (here < num_experts), here, -1)

"""A transport for the tests: every chip sees the rows of its whole group, and works on those of its own experts.

It shows what a transport consists of, and saves nothing: rows that a wire rounds to 8 bits travel in full width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan, each_choice, make_plan, unsorted_plan
from pallas_kernels.quantize import QTensor, Rounded, Rows, dequantize
from sharding.collectives import gather
from sharding.exchange.transport import Experts, there_and_back
from sharding.exchange.way import Way
from sharding.tensor_parallel import gather_tokens, sum_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Rows of the whole group that are for experts of this chip, by expert; and the choices of this chip's tokens."""

    rows: Plan
    own: Plan

    @property
    def group_sizes(self) -> jax.Array:
        """int32 [L], the rows for each expert of this chip."""
        return self.rows.group_sizes


def plan_rows(topk_ids: jax.Array, way: Way) -> GroupPlan:
    """Choices [T, K] of this chip -> what this chip does for its group, and where its own choices come back."""
    ids = gather(gather_tokens(topk_ids, way.columns_over), way.axes.expert, 0)
    is_here = way.placement.rank(ids) == lax.axis_index(way.axes.expert)
    rows = make_plan(jnp.where(is_here, way.placement.slot(ids), -1), way.placement.num_local)
    return GroupPlan(rows, unsorted_plan(topk_ids))


def send(x: Rows, plan: GroupPlan, way: Way) -> Rows:
    """Rows x [T, H] -> [C, H], sorted by local expert."""
    if way.wire is not None and not isinstance(x, QTensor | Rounded):
        x = x + lax.stop_gradient(dequantize(way.wire.rounded(x).in_8_bits, x.dtype) - x)
    everywhere = jax.tree.map(
        lambda leaf: lax.all_gather(gather_tokens(leaf, way.columns_over), way.axes.expert, tiled=True), x
    )
    return dispatch(everywhere, plan.rows, backend=way.backend)


def give_back(rows: jax.Array, plan: GroupPlan, way: Way) -> jax.Array:
    """[C, H] -> [T·K, H]. Of the rows of a choice, one rank has one, and the others zeros: the sum is exact."""
    slots = lax.psum_scatter(combine(rows, each_choice(plan.rows), backend=way.backend), way.axes.expert, tiled=True)
    return sum_tokens(slots, way.columns_over).astype(rows.dtype) if way.columns_over else slots


def combine_slots(
    slots: jax.Array,
    plan: GroupPlan,
    topk_weights: jax.Array,
    way: Way,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """[T·K, H] -> the weighted sums [T, H]."""
    return combine(slots, plan.own, topk_weights, preferred_element_type=preferred_element_type, backend=way.backend)


def exchange(
    x: Rows,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    way: Way,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """See `sharding.exchange.exchange`."""
    plan = plan_rows(topk_ids, way)
    slots = there_and_back(send, give_back, x, plan, experts, params, way)
    return combine_slots(slots, plan, topk_weights, way, preferred_element_type=preferred_element_type)


def rows_held(num_tokens: int, top_k: int, way: Way) -> int:
    """See `sharding.exchange.transport.Transport`."""
    return way.axes.ep * way.axes.tp * num_tokens * top_k

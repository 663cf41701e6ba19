"""A transport for the tests: every chip sees the rows of its whole group, and works on those of its own experts.

This file, and a line in `sharding.exchange.pick.TRANSPORTS`, are all that a new transport needs.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import each_choice, make_plan, unsorted_plan
from pallas_kernels.quantize import dequantize
from sharding.exchange import DISPATCHED_NAME, PLAN_NAME, RETURNED_NAME, Way
from sharding.exchange.way import named
from sharding.tensor_parallel import gather_tokens, sum_tokens


def exchange(x, topk_weights, topk_ids, experts, params, way: Way, *, preferred_element_type):
    """See `sharding.exchange.exchange`."""
    group, placement = way.axes.expert, way.placement
    rows, ids = (x if way.wire is None else dequantize(way.wire.rounded(x), x.dtype)), topk_ids
    if way.columns_over:
        rows, ids = gather_tokens(rows, way.columns_over), gather_tokens(ids, way.columns_over)
    everywhere = jax.tree.map(lambda leaf: lax.all_gather(leaf, group, tiled=True), (rows, ids))
    rows, ids = everywhere
    is_here = placement.rank(ids) == lax.axis_index(group)
    plan = named(make_plan(jnp.where(is_here, placement.slot(ids), -1), placement.num_local), PLAN_NAME)
    rows = named(dispatch(rows, plan, backend=way.backend), DISPATCHED_NAME)
    made = experts(params, rows, plan.group_sizes)
    # Of the rows of a choice, one rank has one, and the others zeros: the sum is exact.
    made = combine(made, each_choice(plan), backend=way.backend)
    made = lax.psum_scatter(made, group, tiled=True)
    if way.columns_over:
        made = sum_tokens(made, way.columns_over).astype(made.dtype)
    made = named(made, RETURNED_NAME)
    return combine(
        made, unsorted_plan(topk_ids), topk_weights, preferred_element_type=preferred_element_type, backend=way.backend
    )


def rows_held(num_tokens: int, top_k: int, way: Way) -> int:
    """See `sharding.exchange.way.Transport`."""
    return way.axes.ep * way.axes.tp * num_tokens * top_k

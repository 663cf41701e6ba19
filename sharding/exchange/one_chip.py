"""No exchange: every chip, or every tensor-parallel group of chips, holds all experts.

Sending vanishes into the gather that sorts the rows by expert, returning into the weighted sum that undoes it. Chips of
a tensor-parallel group work on the tokens of all of them, each on a part of the experts' width.
"""

from typing import Any

import jax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch, plan_and_dispatch
from pallas_kernels.moved_rows import in_order
from pallas_kernels.plan import Plan, make_plan
from pallas_kernels.quantize import Copied, Rows, ToRound
from pallas_kernels.tracing.named import named
from sharding.exchange.room import bounded
from sharding.exchange.transport import PLAN_NAME, Experts, WeighingExperts, there_and_back
from sharding.exchange.way import Way
from sharding.tensor_parallel import gather_tokens, sum_tokens


def plan_rows(topk_ids: jax.Array, way: Way) -> Plan:
    """The plan of [T, K] choices into rows sorted by expert, no more rows than choices that are made."""
    plan = make_plan(gather_tokens(topk_ids, way.columns_over), way.placement.num_experts, backend=way.backend)
    return bounded(plan, way)


def send(x: Copied, plan: Plan, way: Way) -> Rows:
    """Rows x [T, H] -> [C, H], sorted by expert; in 8 bits if every row has scales of its own."""
    return dispatch(gather_tokens(x, way.columns_over), plan, backend=way.backend)


def give_back(rows: jax.Array, plan: Plan, way: Way) -> jax.Array:
    """The rows as they are: those who sum them know where they lie."""
    del plan, way
    return rows


def combine_slots(
    slots: jax.Array,
    plan: Plan,
    topk_weights: jax.Array,
    way: Way,
    *,
    residual: jax.Array | None = None,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """[C, H] -> the weighted sums [T, H] of this chip's tokens; onto `residual` where experts' width is not split."""
    assert residual is None or not way.columns_over, "each chip that has a part of the sums would add it"
    weights = gather_tokens(topk_weights, way.columns_over)
    dtype = slots.dtype if way.columns_over else preferred_element_type
    y = combine(slots, plan, weights, residual=residual, preferred_element_type=dtype, backend=way.backend)
    return sum_tokens(y, way.columns_over).astype(preferred_element_type) if way.columns_over else y


def exchange(
    x: Copied,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    way: Way,
    *,
    residual: jax.Array | None = None,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """See `sharding.exchange.exchange`; a `residual` only where experts' width is not split."""
    # What is to be rounded takes no gradient, so no policy of remat asks for names here.
    if isinstance(x, ToRound) and way.counted_choices is None:
        plan, rows = plan_and_dispatch(x, topk_ids, way.placement.num_experts, backend=way.backend)
        slots = experts(params, rows, plan.group_sizes)
    else:
        plan = plan_rows(topk_ids, way)
        slots = there_and_back(send, give_back, x, plan, experts, params, way)
    return combine_slots(
        slots, plan, topk_weights, way, residual=residual, preferred_element_type=preferred_element_type
    )


def sum_of_weighed_rows(
    experts: WeighingExperts,
    x: Rows,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: Any,
    way: Way,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """`exchange` where ep is 1, by experts that dispatch, weigh and sum up the rows themselves."""
    plan = named(plan_rows(topk_ids, way), PLAN_NAME)
    weights = gather_tokens(topk_weights, way.columns_over)
    row_weights = in_order(way.backend, weights=weights, plan=plan)
    x = gather_tokens(x, way.columns_over)
    dtype = x.dtype if way.columns_over else preferred_element_type
    y = experts(params, x, row_weights, plan, preferred_element_type=dtype)
    return sum_tokens(y, way.columns_over).astype(preferred_element_type) if way.columns_over else y


def rows_held(num_tokens: int, top_k: int, way: Way) -> int:
    """See `sharding.exchange.transport.Transport`."""
    rows = way.axes.tp * num_tokens * top_k
    return rows if way.counted_choices is None else min(rows, way.counted_choices)

"""No exchange: every chip, or every tensor-parallel group of chips, holds all experts.

Sending vanishes into the gather that sorts the rows by expert, returning into the weighted sum that undoes it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan, make_plan
from pallas_kernels.quantize import Operand
from sharding.exchange.way import DISPATCHED_NAME, PLAN_NAME, RETURNED_NAME, Experts, Way, named
from sharding.tensor_parallel import gather_tokens, sum_tokens


def exchange(
    x: Operand,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    way: Way,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """See `sharding.exchange.exchange`. x may be a QTensor in which every row has scales of its own."""
    axes = way.axes
    if axes.tp > 1:
        x = gather_tokens(x, axes.mlp)
        topk_weights, topk_ids = gather_tokens(topk_weights, axes.mlp), gather_tokens(topk_ids, axes.mlp)
    plan = named(make_rows_plan(topk_ids, way), PLAN_NAME)
    rows = named(dispatch(x, plan, backend=way.backend), DISPATCHED_NAME)
    rows = named(experts(params, rows, plan.group_sizes), RETURNED_NAME)
    if axes.tp == 1:
        return combine(rows, plan, topk_weights, preferred_element_type=preferred_element_type, backend=way.backend)
    partial = combine(rows, plan, topk_weights, preferred_element_type=rows.dtype, backend=way.backend)
    return sum_tokens(partial, axes.mlp).astype(preferred_element_type)


def rows_held(num_tokens: int, top_k: int, way: Way) -> int:
    """See `sharding.exchange.way.Transport`."""
    rows = way.axes.tp * num_tokens * top_k
    return rows if way.counted_choices is None else min(rows, way.counted_choices)


def make_rows_plan(topk_ids: jax.Array, way: Way) -> Plan:
    """The plan of [T, K] assignments into rows sorted by expert, no more of them than choices are made."""
    plan = make_plan(topk_ids, way.placement.num_experts)
    if (most := way.counted_choices) is None:
        return plan
    # Rows in use lie first, so that these hold every choice.
    inverse = jnp.where(plan.inverse < most, plan.inverse, -1)
    return dataclasses.replace(plan, order=plan.order[:most], inverse=inverse)

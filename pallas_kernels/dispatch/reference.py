"""Gathering rows by a plan in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan, tight_plan
from pallas_kernels.plan.counting_sort import Sorted, counting_sort
from pallas_kernels.quantize import QTensor
from pallas_kernels.quantize_rows.reference import quantize_rows


def dispatch[Rows: jax.Array | QTensor](x: Rows, plan: Plan) -> Rows:
    """See `pallas_kernels.dispatch.dispatch`."""
    in_use = plan.order >= 0
    # Not `//`, which looks at signs for each number that is gathered.
    token = jax.lax.div(jnp.maximum(plan.order, 0), jnp.int32(plan.inverse.shape[1]))

    def gather(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] == 0:  # no tokens, yet rows when the plan has a capacity
            return jnp.zeros((token.shape[0], leaf.shape[1]), leaf.dtype)
        return jnp.where(in_use[:, None], leaf[token], jnp.zeros((), leaf.dtype))

    return jax.tree.map(gather, x)


def dispatch_rounded(x: jax.Array, plan: Plan, *, dtype: jnp.dtype) -> QTensor:
    """See `pallas_kernels.dispatch.dispatch`, of a `ToRound`."""
    return dispatch(quantize_rows(x, dtype=dtype), plan)


def plan_and_dispatch(
    x: jax.Array, topk_ids: jax.Array, *, num_groups: int, dtype: jnp.dtype
) -> tuple[Sorted, QTensor]:
    """See `pallas_kernels.dispatch.plan_and_dispatch`."""
    by_group = counting_sort(topk_ids.reshape(-1), num_groups, backend="xla")
    return by_group, dispatch_rounded(x, tight_plan(by_group, topk_ids.shape), dtype=dtype)


def dispatch_weighted(x: jax.Array, plan: Plan, weights: jax.Array, *, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """Every token's row at all its places, times the weight of each: x [T, H], weights [T, K] -> [R, H]."""
    return weighted(dispatch(x, plan), plan, weights, out_dtype)


def weighted(rows: jax.Array, plan: Plan, weights: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows [R, H] times the weights [T, K] of their assignments, multiplied in float32; zeros where there is none."""
    if weights.size == 0:
        return jnp.zeros(rows.shape, out_dtype)
    of_row = weights.astype(jnp.float32).reshape(-1)[jnp.maximum(plan.order, 0)]
    of_row = jnp.where(plan.order >= 0, of_row, 0)
    return (rows.astype(jnp.float32) * of_row[:, None]).astype(out_dtype)

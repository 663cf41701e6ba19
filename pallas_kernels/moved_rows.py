"""Dispatch and combine as primitives: each is the derivative of the other.

    dispatched(x)          rows[r] = x[order[r] // K]                  transposed: combined, with weights of one
    combined(rows, w)      out[t]  = Σ_k w[t, k] · rows[inverse[t, k]] transposed: rows of dispatched(dout), weighted
    weighed(rows, dout)    dw[t, k] = ⟨dout[t], rows[inverse[t, k]]⟩   transposed: as combined, and combined itself

All are linear in x, in rows, in weights, in dout; so these three are all that derivatives of any order are made of.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, Operator, is_asked_for


def _dispatch_transpose(backend: str, drows: jax.Array, operands: Operands) -> Operands:
    plan = operands["plan"]
    ones = jnp.ones(plan.inverse.shape, jnp.float32)
    return {"x": combined(backend, rows=drows, plan=plan, weights=ones, out_dtype=drows.dtype)}


def _combine_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    rows, plan, weights = (operands[name] for name in ("rows", "plan", "weights"))
    if is_asked_for(rows):
        return {"rows": _spread(backend, dout, plan, weights, rows.aval.dtype)}
    if plan.inverse.size == 0:
        return {"weights": jnp.zeros(plan.inverse.shape, weights.aval.dtype)}
    return {"weights": weighed(backend, rows=rows, plan=plan, dout=dout).astype(weights.aval.dtype)}


def _weigh_transpose(backend: str, dweights: jax.Array, operands: Operands) -> Operands:
    rows, plan, dout = (operands[name] for name in ("rows", "plan", "dout"))
    if is_asked_for(rows):
        return {"rows": _spread(backend, dout, plan, dweights, rows.aval.dtype)}
    return {"dout": combined(backend, rows=rows, plan=plan, weights=dweights, out_dtype=dout.aval.dtype)}


def _spread(backend: str, x: jax.Array, plan: Plan, weights: jax.Array, dtype: Any) -> jax.Array:
    """Every token's row at all its places [R, H], times the weight of each."""
    if weights.size == 0:
        return jnp.zeros((plan.order.shape[0], x.shape[1]), dtype)
    row_weights = weights.astype(jnp.float32).reshape(-1)[jnp.maximum(plan.order, 0)]
    row_weights = jnp.where(plan.order >= 0, row_weights, 0)
    rows = dispatched(backend, x=x, plan=plan).astype(jnp.float32) * row_weights[:, None]
    return rows.astype(dtype)


dispatched = Operator("dispatch", "dispatch", linear_in=("x",), transpose=_dispatch_transpose)
"""See `pallas_kernels.dispatch.dispatch`."""

combined = Operator("combine", "combine", linear_in=("rows", "weights"), transpose=_combine_transpose)
"""See `pallas_kernels.combine.combine`."""

weighed = Operator("combine", "combine_dweights", linear_in=("rows", "dout"), transpose=_weigh_transpose)
"""See `pallas_kernels.combine.reference.combine_dweights`."""

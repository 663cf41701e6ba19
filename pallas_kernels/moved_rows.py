"""Dispatch and combine as primitives: each is the derivative of the other.

    dispatched(x)          rows[r] = x[order[r] // K]                  transposed: combined, with weights of one
    spread(x, w)           rows[r] = w[order[r]] · x[order[r] // K]    transposed: combined, and weighed
    combined(rows, w)      out[t]  = Σ_k w[t, k] · rows[inverse[t, k]] transposed: spread, and weighed
    onto(rows, w, x)       out[t]  = x[t] + combined(rows, w)[t]
    weighed(rows, dout)    dw[t, k] = ⟨dout[t], rows[inverse[t, k]]⟩   transposed: as combined, and combined itself
    in_order(w)            rows[r] = w[order[r]]                       transposed: by_choice
    by_choice(rows)        w[t, k] = rows[inverse[t, k]]               transposed: in_order

All but `onto` are linear in x, in rows, in weights, in dout; so derivatives of any order are made of these.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, Operator, is_asked_for, is_zero, zero_tangent


def _dispatch_transpose(backend: str, drows: jax.Array, operands: Operands) -> Operands:
    plan = operands["plan"]
    ones = jnp.ones(plan.inverse.shape, jnp.float32)
    return {"x": combined(backend, rows=drows, plan=plan, weights=ones, out_dtype=drows.dtype)}


def _spread_transpose(backend: str, drows: jax.Array, operands: Operands) -> Operands:
    x, plan, weights = (operands[name] for name in ("x", "plan", "weights"))
    if is_asked_for(x):
        return {"x": combined(backend, rows=drows, plan=plan, weights=weights, out_dtype=x.aval.dtype)}
    return {"weights": _weights_gradient(backend, drows, plan, x, weights.aval.dtype)}


def _combine_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    rows, plan, weights = (operands[name] for name in ("rows", "plan", "weights"))
    if is_asked_for(rows):
        return {"rows": spread(backend, x=dout, plan=plan, weights=weights, out_dtype=rows.aval.dtype)}
    return {"weights": _weights_gradient(backend, rows, plan, dout, weights.aval.dtype)}


def _onto_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    plan, out_dtype, residual = operands["plan"], operands["out_dtype"], tangents["residual"]
    terms = [] if is_zero(residual) else [residual.astype(out_dtype)]
    for name, other in (("rows", "weights"), ("weights", "rows")):
        if not is_zero(tangents[name]):
            moved = {name: tangents[name], other: operands[other]}
            terms.append(combined(backend, plan=plan, out_dtype=out_dtype, **moved))
    out = onto(backend, **operands)
    return out, sum(terms[1:], start=terms[0]) if terms else zero_tangent(out)


def _weigh_transpose(backend: str, dweights: jax.Array, operands: Operands) -> Operands:
    rows, plan, dout = (operands[name] for name in ("rows", "plan", "dout"))
    if is_asked_for(rows):
        return {"rows": spread(backend, x=dout, plan=plan, weights=dweights, out_dtype=rows.aval.dtype)}
    return {"dout": combined(backend, rows=rows, plan=plan, weights=dweights, out_dtype=dout.aval.dtype)}


def _weights_gradient(backend: str, rows: jax.Array, plan: Plan, dout: jax.Array, dtype: Any) -> jax.Array:
    if plan.inverse.size == 0:
        return jnp.zeros(plan.inverse.shape, dtype)
    return weighed(backend, rows=rows, plan=plan, dout=dout).astype(dtype)


def _put_in_order(backend: str, *, weights: jax.Array, plan: Plan) -> jax.Array:
    del backend
    return _at(weights.reshape(-1), plan.order)


def _put_by_choice(backend: str, *, rows: jax.Array, plan: Plan) -> jax.Array:
    del backend
    # What makes the numbers has made them by then, in the order of the rows; it is not done again in another order.
    return _at(jax.lax.optimization_barrier(rows), plan.inverse)


def _at(x: jax.Array, places: jax.Array) -> jax.Array:
    """Of x [N] the numbers at `places`, zeros where these are −1."""
    if x.size == 0:
        return jnp.zeros(places.shape, x.dtype)
    return jnp.where(places < 0, 0, x[jnp.maximum(places, 0)])


def _in_order_transpose(backend: str, drows: jax.Array, operands: Operands) -> Operands:
    return {"weights": by_choice(backend, rows=drows, plan=operands["plan"])}


def _by_choice_transpose(backend: str, dweights: jax.Array, operands: Operands) -> Operands:
    return {"rows": in_order(backend, weights=dweights, plan=operands["plan"])}


dispatched = Operator("dispatch", "dispatch", linear_in=("x",), transpose=_dispatch_transpose)
"""See `pallas_kernels.dispatch.dispatch`."""

spread = Operator("dispatch", "dispatch_weighted", linear_in=("x", "weights"), transpose=_spread_transpose)
"""See `pallas_kernels.dispatch.reference.dispatch_weighted`."""

combined = Operator("combine", "combine", linear_in=("rows", "weights"), transpose=_combine_transpose)
"""See `pallas_kernels.combine.combine`."""

onto = Operator("combine", "combine_onto", jvp=_onto_jvp)
"""See `pallas_kernels.combine.combine`, with a residual."""

weighed = Operator("combine", "combine_dweights", linear_in=("rows", "dout"), transpose=_weigh_transpose)
"""See `pallas_kernels.combine.reference.combine_dweights`."""

in_order = Operator(_put_in_order, "weights_in_order", linear_in=("weights",), transpose=_in_order_transpose)
"""The weights [T, K] of the plan's rows, [R]; zeros for rows without an assignment. Its gradient is a gather too."""

by_choice = Operator(_put_by_choice, "weights_by_choice", linear_in=("rows",), transpose=_by_choice_transpose)
"""The numbers [R] of the plan's rows by assignment, [T, K]; zeros for those without a row."""

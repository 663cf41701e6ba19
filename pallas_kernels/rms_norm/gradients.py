"""Root-mean-square normalisation as a primitive.

    normalized(x, weight, residual)      (y, s)    tangent: `pushed`, at s = x + residual
    pushed(s, weight, dx, dweight)       (dy, dx)  linear in dx and dweight together; transposed: `pulled`
    pulled(s, weight, dy, dsum)          (dx, dweight)

`pushed` hands dx on so that its transpose, `pulled`, gets all that reaches s: one kernel reads a row once, and gives
both gradients. The tangents of these two, of which second derivatives are made, are those of the reference.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.primitive import Operands, Operator, is_asked_for, is_zero, zero_tangent
from pallas_kernels.rms_norm import reference


def _normalize_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    """A result in 8 bits has no tangent; the sum has."""
    result, total = normalized(backend, **operands)
    moved = [tangents[name] for name in ("x", "residual") if not is_zero(tangents[name])]
    dx = reference.add(moved[0].astype(operands["x"].dtype), *(moved[1:] or [None])) if moved else None
    if operands["scaling"] is not None:
        return (result, total), (jax.tree.map(zero_tangent, result), dx if operands["with_sum"] else None)
    dy, dx = pushed(
        backend,
        x=operands["x"] if operands["residual"] is None else total,
        weight=operands["weight"],
        dx=dx,
        dweight=None if is_zero(tangents["weight"]) else tangents["weight"],
        eps=operands["eps"],
        out_dtype=operands["out_dtype"],
    )
    return (result, total), (dy, dx if operands["with_sum"] else None)


def _push_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    return pushed(backend, **operands), _tangent(reference.rms_norm_tangent, operands, tangents)


def _push_transpose(backend: str, cotangents: Any, operands: Operands) -> Operands:
    dy, dsum = cotangents if isinstance(cotangents, tuple) else (cotangents, None)
    dx, dweight = operands["dx"], operands["dweight"]
    if is_zero(dy):
        return {"dx": dsum}
    weight_dtype = dweight.aval.dtype if is_asked_for(dweight) else None
    found = pulled(
        backend,
        x=operands["x"],
        weight=operands["weight"],
        dy=dy,
        dsum=None if is_zero(dsum) else dsum,
        eps=operands["eps"],
        weight_dtype=weight_dtype,
    )
    asked = {"dx": is_asked_for(dx), "dweight": is_asked_for(dweight)}
    return {name: value for (name, is_asked), value in zip(asked.items(), found, strict=True) if is_asked}


def _pull_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    return pulled(backend, **operands), _tangent(reference.rms_norm_pullback, operands, tangents)


def _tangent(function: Callable[..., Any], operands: Operands, tangents: Operands) -> Any:
    """The tangent of function(**operands)."""
    moving = {name: tangent for name, tangent in tangents.items() if isinstance(tangent, jax.Array)}
    at = {name: operands[name] for name in moving}
    return jax.jvp(lambda at: function(**operands | at), (at,), (moving,))[1]


normalized = Operator("rms_norm", "rms_norm", jvp=_normalize_jvp)
"""See `pallas_kernels.rms_norm.reference.rms_norm`."""

pushed = Operator("rms_norm", "rms_norm_tangent", jvp=_push_jvp, transpose=_push_transpose)
"""See `pallas_kernels.rms_norm.reference.rms_norm_tangent`."""

pulled = Operator("rms_norm", "rms_norm_pullback", jvp=_pull_jvp)
"""See `pallas_kernels.rms_norm.reference.rms_norm_pullback`."""

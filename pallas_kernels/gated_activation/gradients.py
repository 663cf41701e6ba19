"""The gated activation as a primitive.

    gated(h, weights)                       (array, 8 bits)     tangent of the array: `pushed`; the 8 bits have none
    pushed(h, dh, weights, dweights)        tangent             linear in dh and dweights together; transposed: `pulled`
    pulled(h, dout, weights)                (dh, dh in 8 bits, dweights, array)
    pulled_with_columns(h, dout, weights, sizes)
                                            (dh in 8 bits, its columns, those of the array, dweights): no tangents

The product before the activation takes both kinds of dh, and the gradient of the weights after it the array once more:
see `grouped_matmul.gradients`. The tangents of `pushed` and `pulled`, of which second derivatives are made, are those
of the reference. `pulled_with_columns` is `pulled` for gradients of weights in 8 bits.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.gated_activation import reference
from pallas_kernels.primitive import Operands, Operator, is_asked_for, is_zero, zero_tangent


def _gate_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    array, rounded = gated(backend, **operands)
    dh, drow_weights = (None if is_zero(tangents[name]) else tangents[name] for name in ("h", "row_weights"))
    tangent = None
    if array is not None and not (dh is None and drow_weights is None):
        options = {name: operands[name] for name in ("h", "row_weights", "activation", "limit", "out_dtype")}
        tangent = pushed(backend, dh=dh, drow_weights=drow_weights, **options)
    return (array, rounded), (tangent, jax.tree.map(zero_tangent, rounded))


def _fewer_gated(operands: Operands, used: list[bool]) -> tuple[Operands, list[bool]]:
    """What is not used is not written; an array that is what 8 bits say is rounded to these all the same."""
    has_array = operands["out_dtype"] is not None
    array, rounded = has_array and used[0], any(used[has_array:])
    needed = {"out_dtype": operands["out_dtype"] if array else None, "with_8_bits": rounded}
    return operands | needed, [array] * has_array + [rounded] * (len(used) - has_array)


def _push_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    return pushed(backend, **operands), _tangent(reference.gated_activation_tangent, operands, tangents)


def _push_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    asked = {name: is_asked_for(operands[name]) for name in ("dh", "drow_weights")}
    dh, _, drow_weights, _ = pulled(
        backend,
        dout=dout,
        **{name: operands[name] for name in ("h", "row_weights", "activation", "limit")},
        with_array=asked["dh"],
        in_8_bits=None,
        with_weights=asked["drow_weights"],
        with_result=None,
        result_in_8_bits=None,
    )
    found = {"dh": dh, "drow_weights": drow_weights}
    return {name: found[name] for name, is_asked in asked.items() if is_asked}


def _pull_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    result = pulled(backend, **operands)
    tangent: Any = None, None, None, None
    if operands["with_array"] or operands["with_weights"] or operands["with_result"] is not None:
        alone = operands | {"in_8_bits": None, "result_in_8_bits": None}
        tangent = _tangent(reference.gated_activation_pullback, alone, tangents)
    return result, (tangent[0], jax.tree.map(zero_tangent, result[1]), *tangent[2:])


def _fewer_pulled(operands: Operands, used: list[bool]) -> tuple[Operands, list[bool]]:
    """An array, the values and scales of a QTensor, weights, and the result, as far as they are asked for."""
    has = {
        "with_array": operands["with_array"],
        "in_8_bits": operands["in_8_bits"] is not None,
        "with_weights": operands["with_weights"],
        "with_result": operands["with_result"] is not None,
    }
    names = [name for name in has for _ in range(2 if name == "in_8_bits" else 1) if has[name]]
    needed = {name for name, is_used in zip(names, used, strict=True) if is_used}
    none = {name: False if isinstance(operands[name], bool) else None for name in has.keys() - needed}
    return operands | none, [name in needed for name in names]


def _pull_with_columns_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError(
        "the pullback of gated_activation with columns in 8 bits cannot be differentiated: nothing but gradients of "
        "weights is made of it. Take second derivatives without gradients of weights in 8 bits"
    )


def _tangent(function: Callable[..., Any], operands: Operands, tangents: Operands) -> Any:
    """The tangent of function(**operands)."""
    moving = {name: tangent for name, tangent in tangents.items() if isinstance(tangent, jax.Array)}
    at = {name: operands[name] for name in moving}
    return jax.jvp(lambda at: function(**operands | at), (at,), (moving,))[1]


gated = Operator("gated_activation", "gated_activation", jvp=_gate_jvp, fewer=_fewer_gated)
"""See `pallas_kernels.gated_activation.reference.gated_activation`."""

pushed = Operator("gated_activation", "gated_activation_tangent", jvp=_push_jvp, transpose=_push_transpose)
"""See `pallas_kernels.gated_activation.reference.gated_activation_tangent`."""

pulled = Operator("gated_activation", "gated_activation_pullback", jvp=_pull_jvp, fewer=_fewer_pulled)
"""See `pallas_kernels.gated_activation.reference.gated_activation_pullback`."""

pulled_with_columns = Operator("gated_activation", "gated_activation_pullback_with_columns", jvp=_pull_with_columns_jvp)
"""See `pallas_kernels.gated_activation.reference.gated_activation_pullback_with_columns`."""

"""Experts in training as a primitive, and their tangent as another one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_activation import gradients as activation
from pallas_kernels.moved_rows import dispatched
from pallas_kernels.primitive import Operands, Operator, is_zero, jvp_of_composed
from pallas_kernels.quantize import Operand, QTensor
from pallas_kernels.trained_mlp.pullback import pullback
from pallas_kernels.trained_mlp.steps import (
    activated,
    as_is,
    as_multiplied,
    moving,
    multiplied,
    pre_activations,
    summed,
    tokens_again,
)

_DIFFERENTIATED = ("x", "row_weights", "gate_up", "down", "gate_up_bias")


def _train(backend: str, *, gate_up: Operand, down: Operand, **operands: Any) -> jax.Array:
    settings = operands["settings"]
    first, second = (
        as_multiplied(backend, w, operands[f"{name}_in_8_bits"], k_major, settings, both_ways=False)[0]
        for name, w, k_major in zip(("gate_up", "down"), (gate_up, down), settings.k_major, strict=True)
    )
    pre = pre_activations(backend, first, operands)
    return _finish(backend, pre=pre, down=second, **_for_the_rest(operands))


def _for_the_rest(operands: Operands) -> Operands:
    return {name: operands[name] for name in ("row_weights", "plan", "settings", "out_dtype")}


def _finish(backend: str, *, pre: jax.Array, down: Operands, with_face: bool = False, **operands: Any) -> jax.Array:
    """What is left after the first product. `with_face` for derivatives, which pass the rounding; else for values."""
    array, in_8_bits = activated(backend, pre, operands, in_8_bits_alone=not with_face)
    if in_8_bits is not None:
        rows = multiplied(backend, in_8_bits, down, operands, face=array, is_widened=with_face)
    else:
        assert array is not None, "it was asked for"
        rows = multiplied(backend, array, down, operands)
    return summed(backend, [rows], operands["plan"], operands["out_dtype"])


def _train_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    settings = operands["settings"]
    directions = {name: _direction(operands[name], tangents[name]) for name in _DIFFERENTIATED}
    before_down = any(tangent is not None for name, tangent in directions.items() if name != "down")

    def weights(name: str, k_major: bool, both_ways: bool) -> tuple[Operands, Operands]:
        w, in_8_bits = operands[name], operands[f"{name}_in_8_bits"]
        return as_multiplied(backend, w, in_8_bits, k_major, settings, both_ways=both_ways)

    first, first_kept = weights("gate_up", settings.k_major[0], directions["x"] is not None)
    second, second_kept = weights("down", settings.k_major[1], before_down)
    pre = pre_activations(backend, first, operands)
    y = finished(backend, pre=pre, down=second, **_for_the_rest(operands))
    kept = {name: operands[name] for name in ("x", "x_in_8_bits", "row_weights", "plan", "settings", "out_dtype")}
    if all(tangent is None for tangent in directions.values()):
        return y, None
    return y, moved(backend, **kept, pre=pre, gate_up=first_kept, down=second_kept, directions=directions)


def _direction(operand: Operand | None, tangent: Any) -> jax.Array | None:
    """The tangent of an operand, None if it has none."""
    return None if is_zero(tangent) or isinstance(operand, QTensor) else tangent


def _move(backend: str, *, pre: jax.Array, gate_up: Operands, down: Operands, **operands: Any) -> jax.Array:
    """The tangent of `trained` for `directions`, by name, some of which are None."""
    settings, plan, moves = (operands[name] for name in ("settings", "plan", "directions"))
    terms = []
    if moves["x"] is not None:
        rows = dispatched(backend, x=moves["x"].astype(settings.dtype), plan=plan)
        terms.append(multiplied(backend, rows, gate_up, operands))
    if moves["gate_up"] is not None:
        terms.append(
            multiplied(backend, tokens_again(backend, operands), moving(gate_up, moves["gate_up"], settings), operands)
        )
    if moves["gate_up_bias"] is not None:
        ones = jnp.ones((pre.shape[0], 1), settings.dtype)
        terms.append(multiplied(backend, ones, as_is(moves["gate_up_bias"][:, None], False), operands))
    dpre = sum(terms[1:], start=terms[0]) if terms else None
    found = []
    if terms or moves["row_weights"] is not None:
        dh = activation.pushed(
            backend,
            h=pre,
            dh=dpre,
            row_weights=operands["row_weights"],
            drow_weights=moves["row_weights"],
            activation=settings.activation,
            limit=settings.limit,
            out_dtype=settings.dtype,
        )
        found.append(multiplied(backend, dh, down, operands))
    if moves["down"] is not None:
        h, _ = activated(backend, pre, operands)
        assert h is not None, "it was asked for"
        found.append(multiplied(backend, h, moving(down, moves["down"], settings), operands))
    return summed(backend, found, plan, operands["out_dtype"])


finished = Operator(
    _finish,
    "trained_mlp_finish",
    jvp=functools.partial(jvp_of_composed, functools.partial(_finish, with_face=True)),
)
"""The part of `trained` behind the first product."""

trained = Operator(_train, "trained_mlp", jvp=_train_jvp)
"""See `trained_mlp`, which makes its operands."""

moved = Operator(_move, "trained_mlp_tangent", transpose=pullback)
"""The tangent of `trained`, linear in all its directions together."""

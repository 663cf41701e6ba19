"""The experts of one chip on its tokens, as training takes them: with a backward pass of their own.

    y[t] = Σ_k w[t, k] · down(act(gate(x[t])) · up(x[t]))         by the experts that token t chose

`trained` is dispatch, gate/up, the activation with the rows' weights, down, and the sum. Its tangent is `moved`, which
takes tokens, the plan, the product of gate and up, and weights as products take them: no more is kept for a gradient.

`moved` is transposed as a whole, not operator by operator. So the cotangent of y is rounded to 8 bits once a token
and copied to rows then, tokens in 8 bits are widened before they are copied, and no row is read only to be rounded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.gated_activation import SCALING
from pallas_kernels.gated_activation import gradients as activation
from pallas_kernels.grouped_matmul.gradients import GATE_UP_NAME, correlated, multiplied
from pallas_kernels.grouped_matmul.weights import in_one_pass, rounded, rounded_both_ways
from pallas_kernels.moved_rows import combined, dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, Operator, is_asked_for, is_zero
from pallas_kernels.quantize import Operand, QTensor, Quantization, Rounded, Rows, dequantize, quantize
from pallas_kernels.tracing.named import named


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed at trace time.

    Attributes:
      activation: of the gate.
      limit: the clamp before it, or None.
      quantization: how operands are rounded to 8 bits, or None; see `fits`.
      k_major: whether weights of gate/up, and of down, have K last.
      dtype: of rows.
    """

    activation: Activation
    limit: float | None
    quantization: Quantization | None
    k_major: tuple[bool, bool]
    dtype: jnp.dtype

    @property
    def rounds_to(self) -> jnp.dtype | None:
        """The dtype of 8 bits of the factors of products, None if they are not rounded."""
        return None if self.quantization is None else jnp.dtype(self.quantization.dtype)

    @property
    def gradients_round_to(self) -> jnp.dtype | None:
        """That of cotangents where gradients of rows are taken."""
        quantization = self.quantization
        return (
            None
            if quantization is None or quantization.gradient_dtype is None
            else jnp.dtype(quantization.gradient_dtype)
        )


def fits(quantization: Quantization | None, width: int) -> bool:
    """Whether experts of that width can be trained here: activated rows are rounded as `gated_activation` does."""
    return quantization is None or (quantization.lhs_scaling == SCALING and width % 128 == 0)


def trained_mlp(
    x: Rows,
    row_weights: jax.Array,
    plan: Plan,
    gate_up: Operand,
    down: Operand,
    *,
    gate_up_bias: jax.Array | None,
    settings: Settings,
    preferred_element_type: jax.typing.DTypeLike,
    backend: str = "auto",
) -> jax.Array:
    """The sum over each token's choices of what the experts make of it, times the choice's weight.

    Args:
      x: tokens [T, H]; a `Rounded` with scales "1x128", or a QTensor, which takes no gradient, with `quantization`.
      row_weights: float32 [R], of the choices in the plan's order; zeros for rows that hold no token.
      plan: of the choices.
      gate_up: [E, H, 2I], gate first, or [E, 2I, H].
      down: [E, I, H] or [E, H, I].
      gate_up_bias: [E, 2I] or None.
      settings: see there.
      preferred_element_type: of the result.
      backend: of all operators.

    Returns:
      [T, H].
    """
    array, in_8_bits = x, None
    if isinstance(x, Rounded):
        array, in_8_bits = x.array, x.in_8_bits
    elif isinstance(x, QTensor):
        array, in_8_bits = None, x
    weights = {"gate_up": gate_up, "down": down}
    return trained(
        backend,
        x=array,
        x_in_8_bits=jax.lax.stop_gradient(in_8_bits),
        row_weights=row_weights,
        plan=plan,
        **{name: jax.lax.stop_gradient(w) if isinstance(w, QTensor) else w for name, w in weights.items()},
        gate_up_bias=gate_up_bias,
        settings=settings,
        out_dtype=jnp.dtype(preferred_element_type),
    )


def _train(backend: str, *, gate_up: Operand, down: Operand, **operands: Any) -> jax.Array:
    settings, plan = operands["settings"], operands["plan"]
    first, second = (
        _as_multiplied(backend, w, k_major, settings, both_ways=False)[0]
        for w, k_major in zip((gate_up, down), settings.k_major, strict=True)
    )
    pre = _pre_activations(backend, first, operands)
    return _summed(backend, [_down(backend, pre, second, operands)], plan, operands["out_dtype"])


def _train_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    settings, plan = operands["settings"], operands["plan"]
    directions = {name: _direction(operands[name], tangents[name]) for name in _DIFFERENTIATED}
    before_down = any(tangent is not None for name, tangent in directions.items() if name != "down")
    first, first_kept = _as_multiplied(
        backend, operands["gate_up"], settings.k_major[0], settings, both_ways=directions["x"] is not None
    )
    second, second_kept = _as_multiplied(
        backend, operands["down"], settings.k_major[1], settings, both_ways=before_down
    )
    pre = _pre_activations(backend, first, operands)
    y = _summed(backend, [_down(backend, pre, second, operands)], plan, operands["out_dtype"])
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
        terms.append(_multiplied(backend, rows, gate_up, operands))
    if moves["gate_up"] is not None:
        terms.append(
            _multiplied(backend, _tokens_again(backend, operands), _moving(gate_up, moves["gate_up"]), operands)
        )
    if moves["gate_up_bias"] is not None:
        ones = jnp.ones((pre.shape[0], 1), settings.dtype)
        terms.append(_multiplied(backend, ones, _as_is(moves["gate_up_bias"][:, None], False), operands))
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
        found.append(_multiplied(backend, dh, down, operands))
    if moves["down"] is not None:
        h, _ = _activated(backend, pre, operands)
        found.append(_multiplied(backend, h, _moving(down, moves["down"]), operands))
    return _summed(backend, found, plan, operands["out_dtype"])


def _move_transpose(backend: str, dy: jax.Array, operands: Operands) -> Operands:
    """The cotangents of `directions`."""
    settings, plan = operands["settings"], operands["plan"]
    gate_up, down, pre = (operands[name] for name in ("gate_up", "down", "pre"))
    asked = {name for name, direction in operands["directions"].items() if is_asked_for(direction)}
    groups = _groups(plan)
    dy = dy.astype(settings.dtype)
    drows = dispatched(backend, x=dy, plan=plan)
    found = {}

    def of_weights(rows: jax.Array, drows: jax.Array, weights: Operands, name: str) -> jax.Array:
        left, right = (drows, rows) if weights["face_transposed"] else (rows, drows)
        like = operands["directions"][name].aval
        return correlated(
            backend,
            lhs=left,
            lhs_face=None,
            dout=right,
            dout_face=None,
            **groups,
            num_groups=like.shape[0],
            out_dtype=like.dtype,
        )

    def of_rows(drows: jax.Array, in_8_bits: QTensor | None, weights: Operands) -> jax.Array:
        rhs, k_major = weights["rhs"], weights["transpose_rhs"]
        turned = {"rhs": rhs, "transpose_rhs": not k_major}
        if in_8_bits is not None:  # both have N last then, as Hopper needs it
            turned = {"rhs": rhs.mT if k_major else rhs, "transpose_rhs": True}
        return multiplied(
            backend,
            lhs=drows if in_8_bits is None else in_8_bits,
            lhs_face=None if in_8_bits is None else drows,
            lhs_is_widened=False,
            **turned,
            rhs_face=weights["rhs_face"],
            face_transposed=not weights["face_transposed"],
            **groups,
            bias=None,
            quantization=None,
            out_dtype=settings.dtype,
        )

    if asked == {"down"}:
        h, _ = _activated(backend, pre, operands)
        return {"directions": {"down": of_weights(h, drows, down, "down")}}
    in_8_bits, rounds_to = None, settings.gradients_round_to
    if rounds_to is not None:
        of_tokens = quantize(jax.lax.stop_gradient(dy), rounds_to, scaling=SCALING)
        in_8_bits = dispatched(backend, x=of_tokens, plan=plan)
    dh = of_rows(drows, in_8_bits, down)
    dpre, dpre_in_8_bits, drow_weights, h = activation.pulled(
        backend,
        h=pre,
        row_weights=operands["row_weights"],
        activation=settings.activation,
        limit=settings.limit,
        dout=dh,
        with_array=bool(asked & {"x", "gate_up", "gate_up_bias"}),
        in_8_bits=rounds_to if "x" in asked else None,
        with_weights="row_weights" in asked,
        with_result=settings.dtype if "down" in asked else None,
        result_in_8_bits=settings.rounds_to,
    )
    if "row_weights" in asked:
        found["row_weights"] = drow_weights
    if "down" in asked:
        found["down"] = of_weights(h, drows, down, "down")
    if "gate_up" in asked:
        found["gate_up"] = of_weights(_tokens_again(backend, operands), dpre, gate_up, "gate_up")
    if "gate_up_bias" in asked:
        like = operands["directions"]["gate_up_bias"].aval
        ones = jnp.ones((pre.shape[0], 1), settings.dtype)
        sums = correlated(
            backend,
            lhs=ones,
            lhs_face=None,
            dout=dpre,
            dout_face=None,
            **groups,
            num_groups=like.shape[0],
            out_dtype=like.dtype,
        )
        found["gate_up_bias"] = sums[:, 0]
    if "x" in asked:
        dx = [of_rows(dpre, dpre_in_8_bits, gate_up)]
        found["x"] = _summed(backend, dx, plan, operands["directions"]["x"].aval.dtype)
    return {"directions": found}


def _as_multiplied(
    backend: str, w: Operand, k_major: bool, settings: Settings, *, both_ways: bool
) -> tuple[Operands, Operands]:
    """The operands of `multiplied` that are weights: for the product, and for the gradient of its rows."""
    quantization = settings.quantization
    if quantization is None or isinstance(w, QTensor):
        return (_as_is(w, k_major),) * 2
    face = {"rhs_face": w, "face_transposed": k_major}
    if both_ways and quantization.gradient_dtype is not None and in_one_pass(w, quantization):
        k_last, n_last = rounded_both_ways(backend, w, quantization, transposed=k_major)
        return face | {"rhs": k_last, "transpose_rhs": True}, face | {"rhs": n_last, "transpose_rhs": False}
    rhs = rounded(backend, w, quantization, transposed=k_major)
    return (face | {"rhs": rhs, "transpose_rhs": True},) * 2


def _as_is(w: Operand, k_major: bool) -> Operands:
    return {"rhs": w, "rhs_face": None, "transpose_rhs": k_major, "face_transposed": k_major}


def _moving(weights: Operands, direction: jax.Array) -> Operands:
    """`direction` in the place of weights."""
    return _as_is(direction, weights["face_transposed"])


def _groups(plan: Plan) -> Operands:
    return {"group_sizes": plan.group_sizes, "group_offset": jnp.int32(0)}


def _multiplied(
    backend: str,
    lhs: Operand,
    weights: Operands,
    operands: Operands,
    *,
    face: jax.Array | None = None,
    is_widened: bool = False,
    bias: jax.Array | None = None,
) -> jax.Array:
    settings = operands["settings"]
    return multiplied(
        backend,
        lhs=lhs,
        lhs_face=face,
        lhs_is_widened=is_widened,
        **weights,
        **_groups(operands["plan"]),
        bias=bias,
        quantization=settings.quantization,
        out_dtype=settings.dtype,
    )


def _pre_activations(backend: str, weights: Operands, operands: Operands) -> jax.Array:
    x, in_8_bits, plan = (operands[name] for name in ("x", "x_in_8_bits", "plan"))
    rows = None if x is None else dispatched(backend, x=x, plan=plan)
    lhs, face = rows, None
    if in_8_bits is not None:
        lhs, face = dispatched(backend, x=in_8_bits, plan=plan), rows
    bias = operands["gate_up_bias"]
    return named(_multiplied(backend, lhs, weights, operands, face=face, bias=bias), GATE_UP_NAME)


def _activated(backend: str, pre: jax.Array, operands: Operands) -> tuple[jax.Array, QTensor | None]:
    """The activated and weighed rows: an array, and the same in 8 bits if products take these."""
    settings = operands["settings"]
    return activation.gated(
        backend,
        h=pre,
        row_weights=operands["row_weights"],
        activation=settings.activation,
        limit=settings.limit,
        out_dtype=settings.dtype,
        in_8_bits=settings.rounds_to,
        with_8_bits=settings.rounds_to is not None,
    )


def _down(backend: str, pre: jax.Array, weights: Operands, operands: Operands) -> jax.Array:
    array, in_8_bits = _activated(backend, pre, operands)
    if in_8_bits is None:
        return _multiplied(backend, array, weights, operands)
    return _multiplied(backend, in_8_bits, weights, operands, face=array, is_widened=True)


def _tokens_again(backend: str, operands: Operands) -> jax.Array:
    """The rows of tokens as gate/up multiplied them, in 16 bits or more."""
    x, in_8_bits, settings = (operands[name] for name in ("x", "x_in_8_bits", "settings"))
    if in_8_bits is not None:
        x = _past_rounding(x, dequantize(in_8_bits, settings.dtype))
    return dispatched(backend, x=x, plan=operands["plan"])


@jax.custom_jvp
def _past_rounding(x: jax.Array | None, rounded: jax.Array) -> jax.Array:
    """`rounded`, the derivative of which is that of x."""
    del x
    return rounded


@_past_rounding.defjvp
def _(primals, tangents):
    (x, rounded), (dx, _) = primals, tangents
    return rounded, jnp.zeros_like(rounded) if x is None else dx.astype(rounded.dtype)


def _summed(backend: str, rows: list[jax.Array], plan: Plan, dtype: jnp.dtype) -> jax.Array:
    """The sum over a token's rows of the sum of arrays [R, H]."""
    total = sum(rows[1:], start=rows[0])
    ones = jnp.ones(plan.inverse.shape, jnp.float32)
    return combined(backend, rows=total, plan=plan, weights=ones, out_dtype=dtype)


_DIFFERENTIATED = ("x", "row_weights", "gate_up", "down", "gate_up_bias")

trained = Operator(_train, "trained_mlp", jvp=_train_jvp)
"""See `trained_mlp`, which makes its operands."""

moved = Operator(_move, "trained_mlp_tangent", transpose=_move_transpose)
"""The tangent of `trained`, linear in all its directions together."""

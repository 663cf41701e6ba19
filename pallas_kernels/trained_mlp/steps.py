"""The steps of experts in training, each by an operator; what the forward pass, its tangent and its pullback share."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_activation import gradients as activation
from pallas_kernels.grouped_matmul.gradients import GATE_UP_NAME
from pallas_kernels.grouped_matmul.gradients import multiplied as product
from pallas_kernels.grouped_matmul.weights import cast, in_one_pass, rounded, rounded_both_ways
from pallas_kernels.moved_rows import combined, dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands
from pallas_kernels.quantize import Operand, QTensor, dequantize
from pallas_kernels.tracing.named import named
from pallas_kernels.trained_mlp.settings import Settings


def as_multiplied(
    backend: str,
    w: Operand,
    in_8_bits: tuple[QTensor, QTensor | None] | None,
    k_major: bool,
    settings: Settings,
    *,
    both_ways: bool,
) -> tuple[Operands, Operands]:
    """The operands of `multiplied` that are weights: for the product, and for the gradient of its rows.

    `in_8_bits` are the weights K-major and N last, where someone has rounded them.
    """
    quantization = settings.quantization
    if isinstance(w, QTensor):
        return (as_is(w, k_major),) * 2
    w = as_matrices(w)
    if quantization is None:
        return (as_is(cast(w, settings.weights_dtype), k_major),) * 2
    face = {"rhs_face": w, "rhs_n_last": None, "face_transposed": k_major}
    if in_8_bits is not None:
        k_last, n_last = in_8_bits
        first = face | {"rhs": k_last, "transpose_rhs": True}
        is_wanted = quantization.gradient_dtype is not None and n_last is not None
        return first, face | {"rhs": n_last, "transpose_rhs": False} if is_wanted else first
    if both_ways and quantization.gradient_dtype is not None and in_one_pass(w, quantization):
        k_last, n_last = rounded_both_ways(backend, w, quantization, transposed=k_major)
        return face | {"rhs": k_last, "transpose_rhs": True}, face | {"rhs": n_last, "transpose_rhs": False}
    rhs = rounded(backend, w, quantization, transposed=k_major)
    return (face | {"rhs": rhs, "transpose_rhs": True},) * 2


def as_matrices(w: jax.Array) -> jax.Array:
    """[E, K, N] of that or of [E, K, 2, N / 2]."""
    return w.reshape(*w.shape[:2], -1)


def as_is(w: Operand, k_major: bool) -> Operands:
    """Weights that are not rounded here, as operands of `multiplied`."""
    return {"rhs": w, "rhs_face": None, "rhs_n_last": None, "transpose_rhs": k_major, "face_transposed": k_major}


def moving(weights: Operands, direction: jax.Array, settings: Settings) -> Operands:
    """`direction` in the place of weights, in the dtype of rows, beside which kernels take no other."""
    return as_is(as_matrices(direction).astype(settings.dtype), weights["face_transposed"])


def groups(plan: Plan) -> Operands:
    """Where the rows of experts lie, as operands of products."""
    return {"group_sizes": plan.group_sizes, "group_offset": jnp.int32(0)}


def multiplied(
    backend: str,
    lhs: Operand,
    weights: Operands,
    operands: Operands,
    *,
    face: jax.Array | None = None,
    is_widened: bool = False,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Rows times weights; `face` is the array that rows are in 8 bits, and `is_widened` whether it says the same."""
    settings = operands["settings"]
    return product(
        backend,
        lhs=lhs,
        lhs_face=face,
        lhs_is_widened=is_widened,
        **weights,
        **groups(operands["plan"]),
        bias=bias,
        quantization=settings.quantization,
        out_dtype=settings.dtype,
    )


def pre_activations(backend: str, weights: Operands, operands: Operands) -> jax.Array:
    """The rows of tokens times the weights of gate and up: [R, 2I], known to `jax.checkpoint` by name."""
    x, in_8_bits, plan = (operands[name] for name in ("x", "x_in_8_bits", "plan"))
    rows = None if x is None else dispatched(backend, x=x, plan=plan)
    lhs: Any = rows
    face = None
    if in_8_bits is not None:
        lhs, face = dispatched(backend, x=in_8_bits, plan=plan), rows
    bias = operands["gate_up_bias"]
    return named(multiplied(backend, lhs, weights, operands, face=face, bias=bias), GATE_UP_NAME)


def activated(
    backend: str, pre: jax.Array, operands: Operands, *, in_8_bits_alone: bool = False
) -> tuple[jax.Array | None, QTensor | None]:
    """The activated and weighed rows: an array, and the same in 8 bits if products take these."""
    settings = operands["settings"]
    return activation.gated(
        backend,
        h=pre,
        row_weights=operands["row_weights"],
        activation=settings.activation,
        limit=settings.limit,
        out_dtype=None if in_8_bits_alone and settings.rounds_to is not None else settings.dtype,
        in_8_bits=settings.rounds_to,
        with_8_bits=settings.rounds_to is not None,
    )


def tokens_again(backend: str, operands: Operands) -> jax.Array:
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


def summed(backend: str, rows: list[jax.Array], plan: Plan, dtype: jnp.dtype) -> jax.Array:
    """The sum over a token's rows of the sum of arrays [R, H]."""
    total = sum(rows[1:], start=rows[0])
    ones = jnp.ones(plan.inverse.shape, jnp.float32)
    return combined(backend, rows=total, plan=plan, weights=ones, out_dtype=dtype)

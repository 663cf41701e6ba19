"""Gated activations in plain XLA, their tangent and their pullback, in float32 and rounded once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, gated_halves
from pallas_kernels.columns import Columns
from pallas_kernels.quantize import QTensor, dequantize, quantize
from pallas_kernels.quantize_columns.reference import quantize_columns

SCALING = "1x128"
"""How results in 8 bits are scaled."""


def gated_activation(
    h: jax.Array,
    row_weights: jax.Array | None,
    *,
    activation: Activation,
    limit: float | None,
    out_dtype: jnp.dtype | None,
    in_8_bits: jnp.dtype | None,
    with_8_bits: bool,
) -> tuple[jax.Array | None, QTensor | None]:
    """act(gate) · up · the row's weight.

    Args:
      h: pre-activations [R, 2I], gate first.
      row_weights: float32 [R], or None for ones.
      activation: see `pallas_kernels.activations`.
      limit: its clamp, or None.
      out_dtype: of the array; None if it is not asked for.
      in_8_bits: dtype to which the result is rounded: the array is what it says then. It is rounded as without weights,
        which go into the scales. None for no rounding.
      with_8_bits: whether the QTensor is asked for.

    Returns:
      An array [R, I] and a QTensor [R, I], None for what is not asked for.
    """
    wide = h.astype(jnp.float32)
    if in_8_bits is None:
        assert out_dtype is not None, "nothing is asked for"
        return _weighed(wide, row_weights, activation=activation, limit=limit).astype(out_dtype), None
    rounded = quantize(gated_halves(wide, activation, limit), in_8_bits, scaling=SCALING)
    if row_weights is not None:
        rounded = QTensor(rounded.values, rounded.scale * row_weights[:, None])
    return None if out_dtype is None else dequantize(rounded, out_dtype), rounded if with_8_bits else None


def gated_activation_tangent(
    h: jax.Array,
    dh: jax.Array | None,
    row_weights: jax.Array | None,
    drow_weights: jax.Array | None,
    *,
    activation: Activation,
    limit: float | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """The tangent [R, I] of `gated_activation`, past any rounding; None stands for a tangent of zero."""
    wide = h.astype(jnp.float32)
    function = functools.partial(_weighed, activation=activation, limit=limit)
    if drow_weights is None:
        assert dh is not None, "nothing moves"
        tangent = jax.jvp(lambda h: function(h, row_weights), (wide,), (dh.astype(jnp.float32),))[1]
    elif dh is None:
        tangent = function(wide, drow_weights)
    else:
        tangent = jax.jvp(function, (wide, row_weights), (dh.astype(jnp.float32), drow_weights))[1]
    return tangent.astype(out_dtype)


def gated_activation_pullback(
    h: jax.Array,
    dout: jax.Array,
    row_weights: jax.Array | None,
    *,
    activation: Activation,
    limit: float | None,
    with_array: bool,
    in_8_bits: jnp.dtype | None,
    with_weights: bool,
    with_result: jnp.dtype | None,
    result_in_8_bits: jnp.dtype | None,
) -> tuple[jax.Array | None, QTensor | None, jax.Array | None, jax.Array | None]:
    """The cotangents of h [R, 2I] and of the weights for that of the result, dout [R, I]; and the result once more.

    Args:
      h: see `gated_activation`, as for all that is not listed here.
      dout: floating point of any width.
      row_weights: likewise.
      activation: likewise.
      limit: likewise.
      with_array: whether the array is asked for.
      in_8_bits: dtype of the QTensor; None if it is not asked for.
      with_weights: whether the cotangent of the weights is asked for.
      with_result: dtype of the result; None if it is not asked for.
      result_in_8_bits: dtype of 8 bits to which the result has been rounded: `in_8_bits` of `gated_activation`. What
        these say is what the weights were multiplied with.

    Returns:
      Of h an array in its dtype and a QTensor, each of the float32 values, of the weights float32 [R], and the array
      that `gated_activation` gives; None for what is not asked for.
    """
    result = None
    if with_result is not None:
        options: Any = {"activation": activation, "limit": limit, "in_8_bits": result_in_8_bits}
        result, _ = gated_activation(h, row_weights, **options, out_dtype=with_result, with_8_bits=False)
    wide, dout = h.astype(jnp.float32), dout.astype(jnp.float32)
    value, pull = jax.vjp(functools.partial(gated_halves, activation=activation, limit=limit), wide)
    dh = rounded = None
    if with_array or in_8_bits is not None:
        (found,) = pull(dout if row_weights is None else dout * row_weights[:, None])
        dh = found.astype(h.dtype) if with_array else None
        rounded = None if in_8_bits is None else quantize(found, in_8_bits, scaling=SCALING)
    return dh, rounded, _of_weights(value, dout, result_in_8_bits) if with_weights else None, result


def gated_activation_pullback_with_columns(
    h: jax.Array,
    dout: jax.Array,
    row_weights: jax.Array | None,
    group_sizes: jax.Array,
    *,
    activation: Activation,
    limit: float | None,
    in_8_bits: jnp.dtype,
    result_in_8_bits: jnp.dtype,
    with_weights: bool,
) -> tuple[QTensor, Columns, Columns, jax.Array | None]:
    """The cotangents in 8 bits by rows and by columns, and the result by columns: what gradients of weights take.

    Args:
      h: see `gated_activation_pullback`, as for all that is not listed here.
      dout: likewise.
      row_weights: likewise.
      group_sizes: integer [G], rows of each group, which follow one another and are R at most in all.
      activation: likewise.
      limit: likewise.
      in_8_bits: dtype of the cotangent of h, by rows and by columns.
      result_in_8_bits: dtype of the result.
      with_weights: likewise.

    Returns:
      The cotangent of h as a QTensor and as `Columns` of 2I, the result as `Columns` of I, each of the float32 values
      times the weights of the rows, and float32 [R] of the weights. Rows that no group owns mean nothing in what goes
      by rows, and count for nothing elsewhere.
    """
    wide, dout = h.astype(jnp.float32), dout.astype(jnp.float32)
    value, pull = jax.vjp(functools.partial(gated_halves, activation=activation, limit=limit), wide)
    weights = 1.0 if row_weights is None else row_weights[:, None]
    (dh,) = pull(dout * weights)
    return (
        quantize(dh, in_8_bits, scaling=SCALING),
        quantize_columns(dh, group_sizes, None, dtype=in_8_bits),
        quantize_columns(value * weights, group_sizes, None, dtype=result_in_8_bits),
        _of_weights(value, dout, result_in_8_bits) if with_weights else None,
    )


def _of_weights(value: jax.Array, dout: jax.Array, in_8_bits: jnp.dtype | None) -> jax.Array:
    """The cotangents of the weights of rows: they multiply what is rounded, if it is."""
    if in_8_bits is not None:
        value = dequantize(quantize(value, in_8_bits, scaling=SCALING))
    return jnp.sum(dout * value, axis=1)


def _weighed(h: jax.Array, row_weights: jax.Array | None, *, activation: Activation, limit: float | None) -> jax.Array:
    value = gated_halves(h, activation, limit)
    return value if row_weights is None else value * row_weights[:, None]

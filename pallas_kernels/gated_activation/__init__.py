"""The gated activation between the two products of an expert, with what the second takes in 8 bits.

    h [R, 2I], gate first  ->  act(gate) · up · weight of the row [R, I]      see `pallas_kernels.activations`

All is computed in float32 and rounded once. Training takes it from here; in serving it is fused with the product
before it (`grouped_gate_up`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.gated_activation.gradients import gated
from pallas_kernels.gated_activation.reference import SCALING
from pallas_kernels.quantize import QDtype, Rounded, check_qdtype, scale_shape, takes_gradient


def gated_activation(
    h: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """act(gate) · up of pre-activations, times the weight of the row.

    Args:
      h: [R, 2I], gate first; floating point of 16 or 32 bits.
      row_weights: float32 [R], by which rows are multiplied; None for ones.
      activation: silu, gelu, gelu_tanh, swigluoai or relu2.
      activation_limit: clamp before the activation, or None.
      out_dtype: of the result; default is that of h.
      backend: "auto", "xla" or "pallas_gpu".

    Returns:
      [R, I].

    Raises:
      ValueError: h is not as above, or the activation is unknown.
      Unsupported: a named backend cannot do this.
    """
    _check(h, row_weights, activation, activation_limit)
    array, _ = gated(
        backend,
        h=h,
        row_weights=row_weights,
        activation=activation,
        limit=activation_limit,
        out_dtype=h.dtype if out_dtype is None else jnp.dtype(out_dtype),
        in_8_bits=None,
        with_8_bits=False,
    )
    assert array is not None, "it was asked for"
    return array


def gated_activation_in_8_bits(
    h: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    dtype: QDtype = "float8_e4m3fn",
    activation: Activation = "silu",
    activation_limit: float | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> Rounded:
    """`gated_activation` for a product in 8 bits: the float32 result rounded as `quantize` does with scaling "1x128".

    It is rounded as it is without weights, which go into the scales.

    Args:
      h: see `gated_activation`, as for all that is not listed here.
      row_weights: likewise.
      dtype: of 8 bits.
      activation: likewise.
      activation_limit: likewise.
      out_dtype: of the result's `array`; default is that of h.
      backend: likewise.

    Returns:
      A `Rounded` [R, I]: its `array` is what its 8 bits say, and gradients go to it as if it had not been rounded.
      Nothing is written that nobody takes.

    Raises:
      ValueError: as `gated_activation`, or I is not divisible by 128.
      Unsupported: a named backend cannot do this.
    """
    _check(h, row_weights, activation, activation_limit)
    scale_shape((h.shape[0], h.shape[1] // 2), SCALING)
    array, rounded = gated(
        backend,
        h=h,
        row_weights=row_weights,
        activation=activation,
        limit=activation_limit,
        out_dtype=h.dtype if out_dtype is None else jnp.dtype(out_dtype),
        in_8_bits=jnp.dtype(check_qdtype(dtype)),
        with_8_bits=True,
    )
    assert array is not None, "it was asked for"
    return Rounded(array, rounded, is_widened=True)


def _check(h: jax.Array, row_weights: jax.Array | None, activation: str, limit: float | None) -> None:
    check_activation(activation, limit)
    if h.ndim != 2 or h.shape[1] % 2 or not takes_gradient(h):
        raise ValueError(f"h must be [R, 2I], floating point of 16 or 32 bits, got {h.dtype}{list(h.shape)}")
    if row_weights is not None and (row_weights.shape != h.shape[:1] or row_weights.dtype != jnp.float32):
        got = f"{row_weights.dtype}{list(row_weights.shape)}"
        raise ValueError(f"row_weights must be float32 [R] = [{h.shape[0]}], got {got}")


__all__ = ["SCALING", "gated_activation", "gated_activation_in_8_bits"]

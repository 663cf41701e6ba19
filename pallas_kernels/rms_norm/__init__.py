"""Root-mean-square normalisation, what a decoder does before each of its blocks, with the sum before it.

    s = x + residual [..., H], weight [H]  ->  y = s / sqrt(mean(s²) + eps) · weight [..., H]

The statistics and the product are float32 and the result is rounded once (Zhang and Sennrich, 2019, arXiv:1910.07467):
a row whose squares overflow, from 1e19 on, becomes zeros.
`rms_norm` gives an array, `rms_norm_in_8_bits` what a product in 8 bits takes.
"""

import math
import numbers
from typing import Any, overload

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import require_arrays, require_given_arrays
from pallas_kernels.dtypes import is_float
from pallas_kernels.quantize import QDtype, Rounded, Scaling, check_qdtype, is_of_one_row, scale_shape
from pallas_kernels.rms_norm.gradients import normalized


@overload
def rms_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    *,
    residual: None = None,
    eps: float = 1e-6,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array: ...
@overload
def rms_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    *,
    residual: jax.Array,
    eps: float = 1e-6,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]: ...


def rms_norm(x, weight=None, *, residual=None, eps=1e-6, out_dtype=None, backend="auto"):
    """Normalises rows to a mean square of one, and weights them.

    Args:
      x: [..., H], BF16, FP16 or float32.
      weight: [H], floating point; None for ones. (Where a checkpoint stores weight − 1, as Gemma's do, pass 1 + it.)
      residual: of the shape of x, what is added to x first; None for nothing.
      eps: is added to the mean of squares; a number.
      out_dtype: dtype of the normalised rows; default is that of x.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The normalised rows [..., H]; with `residual` a pair of them and of x + residual, summed in float32 and rounded to
      the dtype of x before it is normalised.

    Raises:
      ValueError: shapes do not fit, a dtype is not one of the above, or eps is not a number or negative.
      Unsupported: a named backend cannot do this.
    """
    _check(x, weight, residual, eps, out_dtype)
    y, total = normalized(
        backend,
        x=_rows(x),
        weight=weight,
        residual=None if residual is None else _rows(residual),
        eps=float(eps),
        out_dtype=x.dtype if out_dtype is None else jnp.dtype(out_dtype),
        scaling=None,
        with_sum=residual is not None,
    )
    y = y.reshape(x.shape)
    return y if residual is None else (y, total.reshape(x.shape))


@overload
def rms_norm_in_8_bits(
    x: jax.Array,
    weight: jax.Array | None = None,
    *,
    residual: None = None,
    dtype: QDtype = "float8_e4m3fn",
    scaling: Scaling = "1x128",
    eps: float = 1e-6,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> Rounded: ...
@overload
def rms_norm_in_8_bits(
    x: jax.Array,
    weight: jax.Array | None = None,
    *,
    residual: jax.Array,
    dtype: QDtype = "float8_e4m3fn",
    scaling: Scaling = "1x128",
    eps: float = 1e-6,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> tuple[Rounded, jax.Array]: ...


def rms_norm_in_8_bits(
    x,
    weight=None,
    *,
    residual=None,
    dtype="float8_e4m3fn",
    scaling="1x128",
    eps=1e-6,
    out_dtype=None,
    backend="auto",
):
    """`rms_norm` for a product in 8 bits: the float32 result is rounded once, as `quantize` does.

    Args:
      x: [T, H], as in `rms_norm`, as is all that is not listed here.
      weight: likewise.
      residual: likewise.
      dtype: of 8 bits.
      scaling: "1x128", "per_row" or another that gives every row scales of its own.
      eps: likewise.
      out_dtype: of the result's `array`.
      backend: likewise.

    Returns:
      A `Rounded` [T, H], which products and `dispatch` take: its `in_8_bits` is the QTensor, and its `array` is what
      `rms_norm` gives. Gradients go to the array, past the rounding; under `jax.jit` nothing is computed of it but what
      someone takes. With `residual` a pair of it and of x + residual.

    Raises:
      ValueError: as `rms_norm`, or H is not divisible by the block of the scaling, or rows share scales.
      Unsupported: a named backend cannot do this.
    """
    _check(x, weight, residual, eps, out_dtype)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [T, H] where the result is in 8 bits, got {list(x.shape)}")
    if not is_of_one_row(scaling):
        raise ValueError(f"scaling must give every row scales of its own, as '1x128' and 'per_row' do, got {scaling!r}")
    scale_shape(x.shape, scaling)
    options = {"eps": float(eps), "with_sum": residual is not None}
    eight, wide = jnp.dtype(check_qdtype(dtype)), x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    in_8_bits, total = normalized(
        backend, x=x, weight=weight, residual=residual, out_dtype=eight, scaling=scaling, **options
    )
    # The array is made of the sum, and hands it on, so that what comes back to the sum is added within the operator.
    array, total = normalized(
        backend,
        x=x if total is None else total,
        weight=weight,
        residual=None,
        out_dtype=wide,
        scaling=None,
        **options,
    )
    rounded = Rounded(array, in_8_bits)
    return rounded if residual is None else (rounded, total)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _check(x: jax.Array, weight: jax.Array | None, residual: jax.Array | None, eps: object, out_dtype: Any) -> None:
    if not isinstance(eps, numbers.Real) or not 0 <= float(eps) < math.inf:
        raise ValueError(f"eps must be a number from 0 on that is known when this is traced, got {eps!r}")
    require_given_arrays(x=x)
    require_arrays(weight=weight, residual=residual)
    for name, array in (("x", x), ("weight", weight), ("residual", residual)):
        if array is not None and not is_float(array.dtype):
            raise ValueError(f"{name} must be BF16, FP16 or float32, got {array.dtype}")
    if out_dtype is not None and not is_float(out_dtype):
        raise ValueError(f"out_dtype must be BF16, FP16 or float32, got {jnp.dtype(out_dtype)}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., H] with H of at least 1, got {list(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape [H] = {list(x.shape[-1:])}, got {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")


__all__ = ["rms_norm", "rms_norm_in_8_bits"]

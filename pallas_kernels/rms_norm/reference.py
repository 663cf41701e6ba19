"""Root-mean-square normalisation in plain XLA, its tangent and its pullback.

With r = rsqrt(mean(x²) + eps) of a row, and n = r · x, all in float32:

    rms_norm           y = n · weight
    rms_norm_tangent   dy = r · (dx − n · mean(n · dx)) · weight + n · dweight
    rms_norm_pullback  dx = r · (g − n · mean(n · g)) + dsum, g = dy · weight;  dweight = Σ_t dy[t] · n[t]
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize import QTensor, Scaling, quantize


def rms_norm(
    x: jax.Array,
    weight: jax.Array | None,
    residual: jax.Array | None,
    *,
    eps: float,
    out_dtype: jnp.dtype,
    scaling: Scaling | None,
    with_sum: bool,
) -> tuple[jax.Array | QTensor, jax.Array | None]:
    """Rows normalised, and what was normalised.

    Args:
      x: [T, H].
      weight: [H]; None for ones.
      residual: [T, H], what is added to x first; None for zeros.
      eps: is added to the mean of squares.
      out_dtype: of the result, 8 bits with `scaling`.
      scaling: of a result in 8 bits; None for an array.
      with_sum: whether to return x + residual too.

    Returns:
      The normalised rows [T, H]; x + residual in the dtype of x, or None.
    """
    total = add(x, residual)
    y = _weighted(_normalized(total, eps)[0], weight)
    result = y.astype(out_dtype) if scaling is None else quantize(y, out_dtype, scaling=scaling)
    return result, total if with_sum else None


def rms_norm_tangent(
    x: jax.Array,
    weight: jax.Array | None,
    dx: jax.Array | None,
    dweight: jax.Array | None,
    *,
    eps: float,
    out_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array | None]:
    """The tangent of `rms_norm(x, weight)`, and dx: None stands for a tangent of zero."""
    n, r = _normalized(x, eps)
    terms = []
    if dx is not None:
        terms.append(_weighted(_projected(dx.astype(jnp.float32), n, r), weight))
    if dweight is not None:
        terms.append(_weighted(n, dweight))
    return sum(terms[1:], start=terms[0]).astype(out_dtype), dx


def rms_norm_pullback(
    x: jax.Array,
    weight: jax.Array | None,
    dy: jax.Array,
    dsum: jax.Array | None,
    *,
    eps: float,
    weight_dtype: jnp.dtype | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents of x [T, H] and of weight [H], in their dtypes.

    Args:
      x: [T, H], what was normalised.
      weight: [H] or None.
      dy: [T, H], the cotangent of the normalised rows.
      dsum: [T, H], a further cotangent of x, which is added; or None.
      eps: as in `rms_norm`.
      weight_dtype: that of the weight; None if its cotangent is not asked for.
    """
    n, r = _normalized(x, eps)
    dy = dy.astype(jnp.float32)
    dx = _projected(_weighted(dy, weight), n, r)
    if dsum is not None:
        dx = dx + dsum.astype(jnp.float32)
    dweight = None if weight_dtype is None else jnp.sum(dy * n, axis=0).astype(weight_dtype)
    return dx.astype(x.dtype), dweight


def add(x: jax.Array, residual: jax.Array | None) -> jax.Array:
    """Their sum in float32, in the dtype of x."""
    return x if residual is None else (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)


def _normalized(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The rows n [T, H], and r [T, 1]."""
    wide = x.astype(jnp.float32)
    r = lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + eps)
    return wide * r, r


def _projected(g: jax.Array, n: jax.Array, r: jax.Array) -> jax.Array:
    """The derivative of n, which is symmetric, times g."""
    return r * (g - n * jnp.mean(n * g, axis=1, keepdims=True))


def _weighted(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    return x if weight is None else x * weight.astype(jnp.float32)

"""The product in parts: as products of BF16 numbers, which the matrix units of an NVIDIA GPU take.

Outside of them float32 is multiplied twenty times slower. Products of BF16 numbers are exact in the float32
accumulators, and a float32 number is the sum of three BF16 numbers, to the last bit but one; so with a factor that is
BF16 the product is exact but for its sum. A result of 16 bits needs two of the three, and of their products none that
lies below its last bit.

The products of parts are one product, and there are two ways to lay it out. Side by side along the depth the parts sum
up in its accumulators, and its result is written once; but a factor that is BF16 is there once for each part of the
other. Along the other factor's rows or columns it is read once, and there is a result in float32 for each part, which
are then added. The first is for a depth that is less than what the parts would be multiplied along (the gradient of
tokens: E < T), the second for a greater one (logits: H > E; the gradient of the router's weights: T > E).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.float32_matmul import reference
from pallas_kernels.tracing.concrete import is_less

_BITS = 7
"""Of the fraction of a BF16 number."""


def float32_matmul(lhs: jax.Array, rhs: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    """See `pallas_kernels.float32_matmul.float32_matmul`.

    Where both factors have more than BF16 and the result is float32, the product is left to XLA.
    """
    count = 3 if out_dtype == jnp.float32 else 2
    if lhs.dtype != jnp.bfloat16 and rhs.dtype != jnp.bfloat16 and count == 3:
        return reference.float32_matmul(lhs, rhs, out_dtype=out_dtype)
    left, right = _parts(lhs, count), _parts(rhs, count)
    if len(left) == 1 and is_less(rhs.shape[1], lhs.shape[1]):
        return _summed(jnp.split(_dot(lhs, _joined(right, axis=1)), len(right), axis=1), out_dtype)
    if len(right) == 1 and is_less(lhs.shape[0], lhs.shape[1]):
        return _summed(jnp.split(_dot(_joined(left, axis=0), rhs), len(left), axis=0), out_dtype)
    # The smallest terms first, of two parts none that lies below the last bit.
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j >= min(len(left), len(right)) - 1]
    side_by_side = _joined([left[i] for i, _ in pairs], axis=1)
    below = _joined([right[j] for _, j in pairs], axis=0)
    # BF16 the product's own kernel can round to.
    summed = jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32
    return _dot(side_by_side, below, summed).astype(out_dtype)


def _summed(terms: list[jax.Array], out_dtype: jnp.dtype) -> jax.Array:
    return sum(terms[1:], start=terms[0]).astype(out_dtype)


def _joined(parts: list[jax.Array], axis: int) -> jax.Array:
    """Parts as one array, which is made once: a product's own kernel would split its factor again in every tile."""
    return jax.lax.optimization_barrier(jnp.concatenate(parts, axis=axis))


def _dot(lhs: jax.Array, rhs: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    return jnp.dot(lhs, rhs, preferred_element_type=out_dtype)


def _parts(x: jax.Array, count: int) -> list[jax.Array]:
    """BF16 numbers whose sum is x, the smallest first: x itself, or as many as are asked for."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(count):
        # Not a cast there and back, which XLA takes for superfluous.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=_BITS)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return parts[::-1]

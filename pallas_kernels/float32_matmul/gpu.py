"""The product on an NVIDIA GPU: as products of BF16 numbers, which its matrix units take.

Outside of them float32 is multiplied twenty times slower. Products of BF16 numbers are exact in the float32
accumulators, and a float32 number is the sum of three BF16 numbers, to the last bit but one; so with a factor that is
BF16 the product is exact but for its sum. A result of 16 bits needs two of the three, and of their products none that
lies below its last bit.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.float32_matmul import reference

TAKES_SYMBOLS = True
"""Sizes need not be numbers, as there is no kernel to be cut for them; see `pallas_kernels.backend`."""

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
    if len(left) == 1:
        terms = jnp.split(_dot(lhs, jnp.concatenate(right, axis=1)), len(right), axis=1)
    elif len(right) == 1:
        terms = jnp.split(_dot(jnp.concatenate(left, axis=0), rhs), len(left), axis=0)
    else:  # one product, the terms of whose sum lie side by side
        pairs = [(i, j) for i in range(count) for j in range(count - i)]
        side_by_side = jnp.concatenate([left[i] for i, _ in pairs], axis=1)
        below = jnp.concatenate([right[j] for _, j in pairs], axis=0)
        # BF16 the product's own kernel can round to.
        summed = jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32
        return _dot(side_by_side, below, summed).astype(out_dtype)
    total = terms[-1]
    for term in terms[-2::-1]:  # the smallest first
        total += term
    return total.astype(out_dtype)


def _dot(lhs: jax.Array, rhs: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    return jnp.dot(lhs, rhs, preferred_element_type=out_dtype)


def _parts(x: jax.Array, count: int) -> list[jax.Array]:
    """BF16 numbers whose sum is x, the largest first: x itself, or as many as are asked for."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(count):
        # Not a cast there and back, which XLA takes for superfluous.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=_BITS)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return parts

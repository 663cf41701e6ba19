"""The router's matrix product, in float32 whatever its operands are.

A GPU multiplies float32 outside of its matrix units, twenty times slower than BF16. Activations that are BF16 already
need not pay for that: products of BF16 numbers are exact in the float32 accumulators, and a float32 weight is the sum
of three BF16 numbers, to the last bit but one.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tracing.unless_differentiated import jvp_of_moving


def router_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product x [T, H] · kernel [H, E] -> float32 [T, E], with the precision of float32 operands."""
    return _of_bfloat16(x, kernel) if x.dtype == jnp.bfloat16 else _in_float32(x, kernel)


@jax.custom_jvp
def _of_bfloat16(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product in the way that is fastest on the platform. Its derivatives are those of `_in_float32`."""
    return jax.lax.platform_dependent(x, kernel, cuda=_in_bfloat16, default=_in_float32)


@functools.partial(_of_bfloat16.defjvp, symbolic_zeros=True)
def _jvp(operands, tangents):
    # Keeps the operands as they are, not in float32.
    in_float32 = jax.checkpoint(_in_float32, prevent_cse=False)
    return _of_bfloat16(*operands), jvp_of_moving(in_float32, operands, tangents)[1]


def _in_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _in_bfloat16(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if kernel.dtype == jnp.bfloat16:
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    parts, rest = [], kernel.astype(jnp.float32)
    for _ in range(3):
        # Not a cast there and back, which XLA takes for superfluous.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    products = jnp.dot(x, jnp.concatenate(parts, axis=1), preferred_element_type=jnp.float32)
    large, middle, small = jnp.split(products, 3, axis=1)
    return large + (middle + small)

"""The product of matrices widened to float32, in plain XLA."""

import jax
import jax.numpy as jnp


def float32_matmul(lhs: jax.Array, rhs: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    """See `pallas_kernels.float32_matmul.float32_matmul`."""
    wide = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    return jnp.dot(*wide, precision=jax.lax.Precision.HIGHEST).astype(out_dtype)

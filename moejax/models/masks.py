"""Which tokens are real, and what becomes of the others."""

import jax
import jax.numpy as jnp


def kept(x: jax.Array, mask: jax.Array | None, other: jax.Array | int = 0) -> jax.Array:
    """What is real of x [B, L, …], and elsewhere `other`.

    A key without weight counts as 0 times its value: NaN in padding would reach real tokens.
    """
    return x if mask is None else jnp.where(mask[..., None], x, other)


def real_tokens(lengths: jax.Array, length: int) -> jax.Array:
    """Bool [B, L]: the first `lengths` [B] of each sequence."""
    return jnp.arange(length) < lengths[:, None]

"""Running sums of a few numbers, in programs for any sizes too."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tracing.concrete import is_symbolic


def running_sums(x: jax.Array, size: Any, *, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.Array:
    """The sums x[0] + … + x[i] of integers [N].

    Args:
      x: of a fixed length.
      size: of what is worked on. If it is a symbol, neighbours are added up, in log N rounds: XLA's compiler for CPUs
        aborts (jax 0.11 and 0.12) on what becomes of `jnp.cumsum` in a program for symbols and several platforms.
      dtype: of the sums.

    Returns:
      [N].
    """
    if is_symbolic(size):
        return lax.associative_scan(jnp.add, x.astype(dtype))
    return jnp.cumsum(x, dtype=dtype)

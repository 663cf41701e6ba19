"""Running sums of integers, in programs for several platforms too."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tracing.concrete import is_symbolic


def running_sums(x: jax.Array, *, axis: int = 0, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.Array:
    """The sums x[0] + … + x[i] along an axis.

    On CPUs neighbours are added up, in log N rounds: XLA's compiler aborts there (jax 0.11 and 0.12) on what becomes of
    `jnp.cumsum` in a program for several platforms.
    """
    x, at_once = x.astype(dtype), functools.partial(jnp.cumsum, axis=axis)
    if is_symbolic(x.shape[axis]):  # which nothing has a number of rounds for
        return at_once(x)
    return lax.platform_dependent(x, cpu=functools.partial(lax.associative_scan, jnp.add, axis=axis), default=at_once)

"""Which values, and which sizes, can be looked at while a program is being traced.

Sizes are numbers, except where `jax.export` traces for sizes that are known only when the program is called: then they
are symbols, of which Python cannot say whether one is less than another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


def is_known(tree: Any) -> bool:
    """Whether the numbers of `tree` can be read here and now: not traced, and not in part on another host."""
    return all(
        not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(tree)
    )


def is_symbolic(*sizes: Any) -> bool:
    """Whether any of the sizes is a symbol."""
    return any(map(export.is_symbolic_dim, sizes))


def is_less(a: Any, b: Any) -> bool:
    """Whether a < b is known to hold: False where a symbol leaves it open."""
    return not is_symbolic(a, b) and a < b


def nan_rows(x: jax.Array, mask: jax.Array | None = None) -> list[int]:
    """The rows (all dimensions but the last, flattened) of `x` that hold NaN; none when its numbers are not known.

    Rows where the bool `mask` [...] is false are skipped.
    """
    if not is_known((x, mask)):
        return []
    with jax.ensure_compile_time_eval():  # `x` may be a constant of a function that is being traced
        if not _has_nan(x, mask):
            return []
        is_bad = np.isnan(np.atleast_1d(np.asarray(x))).any(-1)
    return np.flatnonzero(is_bad if mask is None else is_bad & np.asarray(mask)).tolist()


@jax.jit
def _has_nan(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    is_bad = jnp.isnan(jnp.atleast_1d(x)).any(-1)
    return (is_bad if mask is None else is_bad & mask).any()

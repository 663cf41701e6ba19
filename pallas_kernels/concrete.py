"""Which values, and which sizes, can be looked at while a program is being traced.

Sizes are numbers, except where `jax.export` traces for sizes that are known only when the program is called: then they
are symbols, of which Python cannot say whether one is less than another.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export


def is_known(x: Any) -> bool:
    """Whether the numbers of `x` can be read here and now: not traced, and not in part on another host."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def is_symbolic(*sizes: Any) -> bool:
    """Whether any of the sizes is a symbol."""
    return any(map(export.is_symbolic_dim, sizes))


def is_less(a: Any, b: Any) -> bool:
    """Whether a < b is known to hold: False where a symbol leaves it open."""
    return not is_symbolic(a, b) and a < b


def nan_rows(x: jax.Array) -> list[int]:
    """The rows (all dimensions but the last, flattened) of `x` that hold NaN; none when its numbers are not known."""
    if not is_known(x):
        return []
    with jax.ensure_compile_time_eval():  # `x` may be a constant of a function that is being traced
        return jnp.flatnonzero(jnp.isnan(x).any(-1)).tolist()

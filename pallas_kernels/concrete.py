"""Which values can be looked at while a program is being traced."""

from typing import Any

import jax
import jax.numpy as jnp


def is_known(x: Any) -> bool:
    """Whether the numbers of `x` can be read here and now: not traced, and not in part on another host."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def nan_rows(x: jax.Array) -> list[int]:
    """The rows (all dimensions but the last, flattened) of `x` that hold NaN; none when its numbers are not known."""
    if not is_known(x):
        return []
    with jax.ensure_compile_time_eval():  # `x` may be a constant of a function that is being traced
        return jnp.flatnonzero(jnp.isnan(x).any(-1)).tolist()

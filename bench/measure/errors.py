"""How far a result is from the right answer, and what went wrong in one line."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def norm_error(result: Any, reference: Any, rows: jax.Array | None = None) -> jax.Array:
    """‖result − reference‖ / ‖reference‖ in float32; of trees of arrays the largest of their leaves, NaN if one is NaN.

    Args:
      result: array or tree.
      reference: the same shapes.
      rows: bool, along the first dimension: those that count; all if None.
    """

    def one(x: jax.Array, right: jax.Array) -> jax.Array:
        x, right = (_only(a.astype(jnp.float32), rows).ravel() for a in (x, right))
        return jnp.linalg.norm(x - right) / jnp.maximum(jnp.linalg.norm(right), jnp.finfo(jnp.float32).tiny)

    # With jnp.maximum a NaN stays one.
    return functools.reduce(jnp.maximum, jax.tree.leaves(jax.tree.map(one, result, reference)))


_norm_error = jax.jit(norm_error)


def relative_error(result: Any, reference: Any, rows: jax.Array | None = None) -> float:
    """`norm_error` as a number."""
    return float(_norm_error(result, reference, rows))


@jax.jit
def _largest_error(result: jax.Array, reference: jax.Array, rows: jax.Array | None) -> jax.Array:
    x, right = result.astype(jnp.float32), reference.astype(jnp.float32)
    error = jnp.abs(x - right) / jnp.maximum(jnp.abs(right), 1)
    return _only(jnp.where(jnp.isfinite(x), error, jnp.inf), rows).max()


def largest_error(result: jax.Array, reference: jax.Array, rows: jax.Array | None = None) -> float:
    """Largest |result − reference| / max(|reference|, 1) over the `rows` that count; infinite if one is not finite."""
    return float(_largest_error(result, reference, rows))


def _only(x: jax.Array, rows: jax.Array | None) -> jax.Array:
    return x if rows is None else jnp.where(jnp.expand_dims(rows, range(1, x.ndim)), x, 0)


def check(error: float, tolerance: float) -> None:
    """Raises ValueError if a relative error exceeds the tolerance, or is not a number."""
    if not error <= tolerance:
        raise ValueError(f"wrong result: relative error {error:.1e}, limit {tolerance:.0e}")


def one_line(message: object, longest: int = 300) -> str:
    """A message as one line, cut where it gets long."""
    text = " ".join(str(message).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def describe(error: BaseException, longest: int = 300) -> str:
    """The kind of an exception and its message in one line."""
    return one_line(f"{type(error).__name__}: {error}", longest)

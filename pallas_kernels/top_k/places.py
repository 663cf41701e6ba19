"""The numbers at K places of each row, and numbers put there: each is the derivative of the other.

    taken(x)      out[t, k] = x[t, ids[t, k]]                         transposed: placed
    placed(x)     out[t, e] = Σ_k x[t, k] where ids[t, k] is e        transposed: taken

Both are linear in x.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.primitive import Operands, Operator

_MOST_COMPARED = 16
"""Places of a row with which every column is compared."""


def _take(backend: str, *, x: jax.Array, ids: jax.Array, columns: int) -> jax.Array:
    del backend, columns
    return jnp.take_along_axis(x, ids, axis=1)


def _place(backend: str, *, x: jax.Array, ids: jax.Array, columns: int) -> jax.Array:
    del backend
    top_k = x.shape[1]
    if top_k > _MOST_COMPARED:
        zeros = jnp.zeros((x.shape[0], columns), x.dtype)
        return zeros.at[jnp.arange(x.shape[0])[:, None], ids].add(x)
    # Not as a scatter: that fills zeros in first, adds one by one, and is fused with nothing that takes the result.
    column, total = jnp.arange(columns, dtype=ids.dtype), jnp.zeros((), x.dtype)
    for k in range(top_k):
        total += jnp.where(ids[:, k, None] == column, x[:, k, None], 0)
    return total


def _take_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    return {"x": placed(backend, x=dout, ids=operands["ids"], columns=operands["columns"])}


def _place_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    return {"x": taken(backend, x=dout, ids=operands["ids"], columns=operands["columns"])}


taken = Operator(_take, "taken_at", linear_in=("x",), transpose=_take_transpose)
"""x [T, E] at ids int32 [T, K], [T, K]; `columns` is E."""

placed = Operator(_place, "placed_at", linear_in=("x",), transpose=_place_transpose)
"""x [T, K] at ids int32 [T, K] of rows of `columns` zeros: [T, E]."""

"""The layout of a wgmma's result: tiles of 64 rows in a warpgroup's registers, and vectors along their two sides."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA_ROWS = 64
"""Rows of a tile, which a warpgroup multiplies at a time."""

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""The layouts of a number for each row, and for each column, of a tile."""


def zeros(columns: int = WGMMA_ROWS, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.Array:
    """A tile of zeros."""
    return plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, columns), dtype), plgpu.Layout.WGMMA)


def iota(axis: int, columns: int = WGMMA_ROWS) -> jax.Array:
    """The numbers of a tile's rows (0), or of its columns (1)."""
    return plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS, columns), axis, layout=plgpu.Layout.WGMMA)


def vector_iota(layout: Any = ROWS) -> jax.Array:
    """The numbers of 64 rows, or columns."""
    return plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS,), 0, layout=layout)


def along_rows(vector: jax.Array, columns: int = WGMMA_ROWS) -> jax.Array:
    """A number for each row, in all of so many columns."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))


def along_columns(vector: jax.Array) -> jax.Array:
    """A number for each column, in all rows of a tile."""
    return lax.broadcast_in_dim(vector, (WGMMA_ROWS, vector.shape[0]), (1,))

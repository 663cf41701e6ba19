"""64 numbers along the rows and 64 along the columns of a tile in a warpgroup's registers, to compare all with all."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""Numbers along each side."""

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""The layouts of vectors along the rows and along the columns of a tile."""


def zeros() -> jax.Array:
    """A tile of zeros."""
    return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.int32), plgpu.Layout.WGMMA)


def iota(axis: int) -> jax.Array:
    """The numbers of a tile's rows (0), or of its columns (1)."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)


def vector_iota(layout: Any = ROWS) -> jax.Array:
    """The numbers of 64 rows, or columns."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout)


def along_rows(vector: jax.Array, width: int = TILE) -> jax.Array:
    """A tile of so many columns with a number for each row."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), (0,))


def along_columns(vector: jax.Array) -> jax.Array:
    """A tile with a number for each column."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), (1,))


def smem(*shape: int) -> Any:
    """Integers in shared memory."""
    return plgpu.SMEM(shape, jnp.int32)

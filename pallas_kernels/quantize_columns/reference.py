"""Rows of groups rounded to 8 bits with the rows last, in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.columns import BLOCK, Columns, rows_of_blocks
from pallas_kernels.quantize import quantize


def quantize_columns(x: jax.Array, group_sizes: jax.Array, row_ids: jax.Array | None, *, dtype: jnp.dtype) -> Columns:
    """See `pallas_kernels.quantize_columns.quantize_columns`. Blocks behind the last group's are zeros here."""
    sources, _ = sources_of_blocks(x, group_sizes, row_ids)
    if x.shape[0] == 0:  # no tokens, yet blocks
        rows = jnp.zeros((sources.size, x.shape[1]), x.dtype)
    else:
        sources = sources.reshape(-1, 1)
        rows = jnp.where(sources >= 0, x[jnp.maximum(sources[:, 0], 0)], jnp.zeros((), x.dtype))
    rounded = quantize(rows, dtype, scaling=f"{BLOCK}x1")
    return Columns(rounded.values.T, rounded.scale)


def sources_of_blocks(x: jax.Array, group_sizes: jax.Array, row_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Which row of x stands at each place of each block, int32 [P/128, 128], and which blocks are a group's.

    A place without a row has −1.
    """
    if row_ids is None:
        return rows_of_blocks(group_sizes, x.shape[0])
    place, is_owned = rows_of_blocks(group_sizes, row_ids.shape[0])
    if row_ids.shape[0] == 0:
        return place, is_owned
    source = row_ids[jnp.maximum(place, 0)]
    return jnp.where((place >= 0) & (source >= 0) & (source < x.shape[0]), source, -1), is_owned

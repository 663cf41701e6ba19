"""Columns in 8 bits: the rows of each group last, in blocks of 128 of one group, for products that sum over rows.

    group_sizes = [130, 0, 5] of M = 140 rows  ->  blocks of rows 0–127, 128–129, 130–134; first_blocks = [0, 2, 2, 3]

Hopper's tensor cores sum 8-bit operands along their last dimension only. So that the gradient of a group's weights, a
sum over its rows, can be taken in 8 bits, features come first, and every feature has a scale of its own in each block.
A group begins with a block of its own, and zeros fill up its last one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import SCALE_BLOCK, QTensor, dequantize

BLOCK = SCALE_BLOCK
"""Rows that share a scale."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Rows [M, F] of G groups in 8 bits, transposed.

    Attributes:
      values: FP8 or INT8 [F, P], P = `padded_rows`(M, G). Blocks behind those of the last group hold anything.
      scale: float32 [P/128, F]; scale[b, f] belongs to values[f, 128·b : 128·(b + 1)].
    """

    values: jax.Array
    scale: jax.Array

    @property
    def dtype(self) -> jnp.dtype:
        """The 8-bit dtype of the values."""
        return self.values.dtype


def padded_rows(num_rows: int, num_groups: int) -> int:
    """Room for `num_rows` rows of `num_groups` groups, however they are dealt out: each may have a part of a block."""
    return BLOCK * (num_rows // BLOCK + num_groups)


def first_blocks(group_sizes: jax.Array) -> jax.Array:
    """The first block of each group, and the one behind the last group's: int32 [G + 1]. Negative sizes count as 0."""
    ends = jnp.cumsum(padded_sizes(group_sizes) // BLOCK, dtype=jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


def padded_sizes(group_sizes: jax.Array) -> jax.Array:
    """The rows that each group takes up, int32 [G]: whole blocks."""
    return (jnp.maximum(group_sizes.astype(jnp.int32), 0) + (BLOCK - 1)) // BLOCK * BLOCK


def rows_of_blocks(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Which of M = `num_rows` rows stands at each place of each block: int32 [P/128, 128], −1 for none.

    With it comes which blocks are a group's: bool [P/128].
    """
    sizes = jnp.maximum(group_sizes.astype(jnp.int32), 0)
    ends, first = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), num_rows), first_blocks(sizes)
    block = jnp.arange(padded_rows(num_rows, sizes.shape[0]) // BLOCK, dtype=jnp.int32)
    group = jnp.minimum((first[1:] <= block[:, None]).sum(1, dtype=jnp.int32), sizes.shape[0] - 1)
    begin = (ends - sizes)[group] + (block - first[group]) * BLOCK
    row = begin[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)
    is_owned = block < first[-1]
    return jnp.where(is_owned[:, None] & (row < ends[group][:, None]), row, -1), is_owned


def dequantize_columns(columns: Columns) -> jax.Array:
    """The padded rows [P, F] that `columns` stand for, in float32."""
    return dequantize(QTensor(columns.values.T, columns.scale))

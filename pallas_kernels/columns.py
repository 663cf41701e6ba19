"""Columns in 8 bits: rows last, in blocks of 128 rows of one group, for products that sum over the rows of a group.

    group_sizes = [130, 0, 5] of M = 140 rows  ->  blocks of rows 0–127, 128–129, 130–134; first_blocks = [0, 2, 2, 3]

Hopper's tensor cores sum 8-bit operands along their last dimension only. So that the gradient of a group's weights, a
sum over its rows, can be taken in 8 bits, features come first, and every feature has a scale of its own in each block.
A group begins with a block of its own, and zeros fill up its last one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import QDtype, QTensor, dequantize, quantize

BLOCK = 128
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


def quantize_columns(x: jax.Array, group_sizes: jax.Array, dtype: QDtype = "float8_e4m3fn") -> Columns:
    """Rows [M, F], BF16, FP16 or float32, sorted by group, as `Columns`; in plain XLA.

    Rows past the sum of `group_sizes` count for nothing.
    """
    sizes = jnp.maximum(group_sizes.astype(jnp.int32), 0)
    first, ends = first_blocks(sizes), jnp.cumsum(sizes)
    block, row_in_block = jnp.divmod(jnp.arange(padded_rows(x.shape[0], sizes.shape[0])), BLOCK)
    group = jnp.minimum((first[1:] <= block[:, None]).sum(1), sizes.shape[0] - 1)
    row = (ends - sizes)[group] + (block - first[group]) * BLOCK + row_in_block
    is_owned = (block < first[-1]) & (row < ends[group])
    rows = jnp.where(is_owned[:, None], x[jnp.clip(row, 0, x.shape[0] - 1)], 0)
    q = quantize(rows, dtype, scaling=f"{BLOCK}x1")
    return Columns(q.values.T, q.scale)


def dequantize_columns(columns: Columns) -> jax.Array:
    """The padded rows [P, F] that `columns` stand for, in float32."""
    return dequantize(QTensor(columns.values.T, columns.scale))

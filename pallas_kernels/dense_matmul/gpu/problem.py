"""What the kernel is asked, and how its work is cut: the values that describe one product."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

BLOCK_K = 64
"""Of a step: a row of lhs has 128 bytes."""

BLOCK_N = 64
"""Columns that the copy engine takes at once; tiles have a multiple of them, and jax 0.11.2 wants that N has, too."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product.

    Attributes:
      rows: M.
      depth: K.
      columns: N.
      windows: matrices of rhs: 1, or 2 for gate and up.
      adds: whether there is a residual.
      dtype: of all arrays, of 16 bits.
    """

    rows: int
    depth: int
    columns: int
    windows: int
    adds: bool
    dtype: jnp.dtype

    @property
    def steps(self) -> int:
        """Of the whole of K."""
        return pl.cdiv(self.depth, BLOCK_K)

    @property
    def rhs_bytes(self) -> int:
        """Of the weights."""
        return self.depth * self.windows * self.columns * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_n: columns of rhs that a block multiplies, of gate and up together.
      num_stages: buffers in the ring.
      parts: of K, each of a block.
      warpgroups: 1 or 2 that multiply, each 64 rows of a tile.
    """

    block_n: int
    num_stages: int
    parts: int = 1
    warpgroups: int = 2

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self.warpgroups * WGMMA_ROWS

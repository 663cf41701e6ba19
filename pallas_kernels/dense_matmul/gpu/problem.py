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
        """Steps of BLOCK_K in the whole of K."""
        return pl.cdiv(self.depth, BLOCK_K)

    @property
    def rhs_bytes(self) -> int:
        """Bytes of rhs."""
        return self.depth * self.windows * self.columns * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_m: rows of a tile, 64 or 128.
      block_n: columns of rhs that a block multiplies, of gate and up together.
      num_stages: buffers in the ring.
      parts: of K, each of a block.
    """

    block_m: int
    block_n: int
    num_stages: int
    parts: int = 1

    @property
    def warpgroups(self) -> int:
        """Those of a block that multiply, each 64 rows; one more loads."""
        return self.block_m // WGMMA_ROWS

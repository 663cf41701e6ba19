"""How a product is cut into tiles, and K in parts."""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.on_gpu.smem import SWIZZLE
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

WARPGROUPS = 2
"""That multiply, each 64 rows of a tile."""

BLOCK_M = WARPGROUPS * WGMMA_ROWS
"""Rows of a tile."""

BLOCK_K = 64
"""Of a step: a row of lhs has 128 bytes."""

_RESERVED_BYTES = 2 * 1024  # barriers, and what lies between buffers


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_n: columns of rhs that a block multiplies, of gate and up together.
      num_stages: buffers in the ring.
      parts: of K, each of a block.
    """

    block_n: int
    num_stages: int
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A product and how it is cut.

    Attributes:
      rows: M.
      depth: K.
      columns: N.
      windows: matrices of rhs: 1, or 2 for gate and up.
      adds: whether there is a residual.
      dtype: of 16 bits.
      config: see there.
    """

    rows: int
    depth: int
    columns: int
    windows: int
    adds: bool
    dtype: jnp.dtype
    config: Config

    @property
    def width(self) -> int:
        """Columns of a tile of the result."""
        return self.config.block_n // self.windows

    @property
    def piece(self) -> int:
        """Columns of it that a block finishes: all, or its share where others multiply parts of the same tile."""
        return self.width // self.config.parts

    @property
    def out_chunk(self) -> int:
        """Columns that pass through a buffer of the result."""
        return math.gcd(SWIZZLE // self.dtype.itemsize, self.piece)

    @property
    def out_slots(self) -> int:
        """Such buffers of a warpgroup, which hold all that it finishes."""
        return self.piece // self.out_chunk

    @property
    def steps(self) -> int:
        """Of the whole of K."""
        return pl.cdiv(self.depth, BLOCK_K)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the columns and along the rows; neighbours along the rows read the same of rhs."""
        return pl.cdiv(self.columns, self.width), pl.cdiv(self.rows, BLOCK_M)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a buffer in the ring."""
        return (BLOCK_M + self.config.block_n) * BLOCK_K * self.dtype.itemsize

    @property
    def sent_bytes(self) -> int:
        """What a block sends the others of its tile, and gets of theirs."""
        return (self.config.parts - 1) * BLOCK_M * self.windows * self.piece * 4

    @property
    def other_bytes(self) -> int:
        """Shared memory of all but the ring."""
        return self.sent_bytes + BLOCK_M * self.piece * self.dtype.itemsize + _RESERVED_BYTES

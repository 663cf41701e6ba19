"""What follows from a problem and a configuration."""

import dataclasses
import math

from jax.experimental import pallas as pl

from pallas_kernels.dense_matmul.gpu.problem import BLOCK_K, Config, Problem
from pallas_kernels.on_gpu.smem import SWIZZLE
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

_RESERVED_BYTES = 2 * 1024  # barriers, and what lies between buffers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A product that is cut.

    Attributes:
      problem: the product.
      config: how it is cut.
    """

    problem: Problem
    config: Config

    @property
    def tile_columns(self) -> int:
        """Columns of a tile of the result."""
        return self.config.block_n // self.problem.windows

    @property
    def finished_columns(self) -> int:
        """Those of a tile that a block finishes: all, or its share where other blocks multiply parts of the same."""
        return self.tile_columns // self.config.parts

    @property
    def out_chunk(self) -> int:
        """Columns that pass through a slot on their way out."""
        return math.gcd(SWIZZLE // self.problem.dtype.itemsize, self.finished_columns)

    @property
    def out_slots(self) -> int:
        """Slots of a warpgroup, which hold all that it finishes."""
        return self.finished_columns // self.out_chunk

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the columns and along the rows; neighbours along the rows read the same of rhs."""
        return pl.cdiv(self.problem.columns, self.tile_columns), pl.cdiv(self.problem.rows, self.config.block_m)

    @property
    def lhs_copy_rows(self) -> int:
        """Rows of a warpgroup's copy of lhs: 64, or all where lhs has fewer.

        Whatever its buffer holds below them is multiplied with the rest, and not stored.
        """
        return min(WGMMA_ROWS, self.problem.rows)

    @property
    def step_rhs_bytes(self) -> int:
        """Bytes of rhs that a block copies in a step."""
        return self.config.block_n * BLOCK_K * self.problem.dtype.itemsize

    @property
    def step_bytes(self) -> int:
        """Bytes that a block copies in a step."""
        rows = self.config.warpgroups * self.lhs_copy_rows
        return self.step_rhs_bytes + rows * BLOCK_K * self.problem.dtype.itemsize

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a buffer in the ring."""
        return self.step_rhs_bytes + self.config.block_m * BLOCK_K * self.problem.dtype.itemsize

    @property
    def sent_bytes(self) -> int:
        """What a block sends the others of its tile in float32, and gets of theirs."""
        return (self.config.parts - 1) * self.config.block_m * self.problem.windows * self.finished_columns * 4

    @property
    def other_bytes(self) -> int:
        """Shared memory of all but the ring."""
        out = self.config.block_m * self.finished_columns * self.problem.dtype.itemsize
        return self.sent_bytes + out + _RESERVED_BYTES

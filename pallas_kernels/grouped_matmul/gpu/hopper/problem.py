"""What the Hopper kernel is asked, and how its work is cut: the values that describe one grouped product."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.on_gpu.prefetch import PLAIN, Prefetch
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS


@dataclasses.dataclass(frozen=True)
class Problem:
    """The properties of a product that decide its tiles.

    Attributes:
      operand: dtype of the operands.
      block_scales: whether scales come every 128 of K.
      fused: whether gate and up are multiplied together.
      result_in_8_bits: whether the result is rounded to FP8.
      num_groups: G.
      num_rows: M, at least 1, of all groups.
      depth: K.
      columns: columns of rhs.
    """

    operand: str
    block_scales: bool
    fused: bool
    result_in_8_bits: bool
    num_groups: int
    num_rows: int
    depth: int
    columns: int

    @property
    def rows(self) -> int:
        """Rows of each group, if they are spread evenly."""
        return -(-self.num_rows // self.num_groups)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the operands."""
        return 1 if "float8" in self.operand else 2


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_m: rows of an output tile: 64, or 64 for each math warpgroup, which otherwise split the columns.
      block_n: columns of the accumulators, at most 256; the fused gate/up kernel makes half as many of the result.
      num_stages: buffers in the ring, each 128 bytes of K deep.
      warpgroups: math warpgroups, 1 or 2.
      strip: column tiles visited for one row tile before the next.
      out_slots: parts of 128 bytes of an output tile's rows that can be on their way out at the same time.
      prefetch: when the kernel starts, and which weights it fetches before the one ahead of it has ended.
    """

    block_m: int
    block_n: int
    num_stages: int
    warpgroups: int
    strip: int
    _: dataclasses.KW_ONLY
    out_slots: int = 2
    prefetch: Prefetch = PLAIN

    @property
    def row_groups(self) -> int:
        """Parts into which the math warpgroups split a tile's rows."""
        return self.block_m // WGMMA_ROWS

    @property
    def column_groups(self) -> int:
        """Parts into which they split its columns."""
        return self.warpgroups // self.row_groups


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator. A scale that is None is absent; "block" scales are applied every 128 of K.

    Attributes:
      out_dtype: of the result. FP8 gets a scale for each row and 128 columns, see `requantizes`.
      lhs_scale: one for all, one a row, or one for each row and 128 of K.
      rhs_scale: one a group, one a column, or one for each 128 columns and 128 of K.
      activation: of the fused gate/up kernel; None for a plain product.
      activation_limit: its clamp.
    """

    out_dtype: jnp.dtype
    lhs_scale: Literal["tensor", "row", "block"] | None = None
    rhs_scale: Literal["tensor", "channel", "block"] | None = None
    activation: Activation | None = None
    activation_limit: float | None = None

    @property
    def requantizes(self) -> bool:
        """Whether the result is rounded to FP8; a tile of it is then as wide as a scale block."""
        return self.out_dtype.itemsize == 1


class Inputs(NamedTuple):
    """The operands in the layouts that the kernel reads.

    Attributes:
      group_sizes: int32 [E].
      group_offset: int32 [1], the group of rhs[0].
      lhs: [M, K].
      rhs: [G, N, K] if K-major, else [G, K, N].
      lhs_scale: float32 [1], [M], or [K/128, M] for blocks; M a multiple of 4.
      rhs_scale: float32 [S], [S, N], or [S, N/128, K/128] for blocks; S is 1 or G.
      bias: [G, N].
    """

    group_sizes: Any
    group_offset: Any
    lhs: Any
    rhs: Any
    lhs_scale: Any
    rhs_scale: Any
    bias: Any

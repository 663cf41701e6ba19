"""How the kernel's work is cut: the sizes that follow from the operands, and shared memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import Activation
from pallas_kernels.on_gpu.smem import SWIZZLE, Views, swizzled
from pallas_kernels.stage import Stage

TOKENS = 8
"""Rows of x in a tile, the fewest that shared memory of the tensor cores has: the kernel takes as many tokens."""

CHOICES = 64
"""Most choices of all tokens."""

WGMMA_ROWS = 64
"""Rows that the tensor cores multiply: those of eight tiles of x; see `kernel`."""

BLOCK = SWIZZLE
"""Depth of a tile, and of a scale's block: 128 numbers of 8 bits."""

SLOT_ROWS = 128
"""Of weights, in a slot of the ring, BLOCK bytes each: tiles of one range of columns, one depth below the other."""

TEAMS = 2
"""Warpgroups that multiply: one waits for the tensor cores while the other scales and adds."""

_MOST_SLOTS = 10
_RESERVED_BYTES = 8 * 1024
"""Barriers, choices, the list, and what stands between buffers for alignment."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      columns: of a tile of h, 16, 32 or 64; they divide I. It takes as many of gate and of up.
      out_columns: of a tile of y, a multiple of 8 up to `columns`; they divide H, and with scales by block 128.
      slots: of the ring, even.
      rows_ahead: experts whose rows of h are in shared memory together, even.
      blocks: of the grid. All have to run at once, as they wait for each other: no more than there are multiprocessors,
        of which each holds one, and no other kernel beside them that waits likewise. XLA runs a program's one by one.
    """

    columns: int
    out_columns: int
    slots: int
    rows_ahead: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a call.

    Attributes:
      num_tokens: T.
      top_k: K.
      hidden: H.
      width: I.
      by_block: whether scales come every 128 of depth (x: 1x128, weights: 128x128), else per row and per channel.
      config: how it is cut.
      activation: of the gate.
      activation_limit: its clamp.
      stage: what is done: all, the multiplications, or the copies.
    """

    num_tokens: int
    top_k: int
    hidden: int
    width: int
    by_block: bool
    config: Config
    activation: Activation = "silu"
    activation_limit: float | None = None
    stage: Stage = "full"

    @property
    def most_hits(self) -> int:
        """Experts that the choices can hit."""
        return self.num_tokens * self.top_k

    @property
    def up_depths(self) -> int:
        """Tiles of gate/up's depth in a slot."""
        return SLOT_ROWS // (2 * self.config.columns)

    @property
    def up_steps(self) -> int:
        """Slots of a tile of h."""
        return pl.cdiv(pl.cdiv(self.hidden, BLOCK), self.up_depths)

    @property
    def up_tiles(self) -> int:
        """Tiles of h of an expert."""
        return pl.cdiv(self.width, self.config.columns)

    @property
    def down_depths(self) -> int:
        """Tiles of down's depth in a slot."""
        return SLOT_ROWS // self.config.columns

    @property
    def down_steps(self) -> int:
        """Slots of a tile of y and an expert."""
        return pl.cdiv(pl.cdiv(self.width, BLOCK), self.down_depths)

    @property
    def down_depths_used(self) -> int:
        """Tiles of depth of a slot that are not all beyond I."""
        return min(self.down_depths, pl.cdiv(self.width, BLOCK))

    @property
    def down_tiles(self) -> int:
        """Tiles of y."""
        return pl.cdiv(self.hidden, self.config.out_columns)

    @property
    def x_rows(self) -> int:
        """Rows of x, as tiles of TOKENS rows and BLOCK columns, zeros past H."""
        return self.up_steps * self.up_depths * TOKENS

    @property
    def h_rows(self) -> int:
        """Rows of h of an expert, likewise: a multiple of WGMMA_ROWS, zeros past I."""
        rows = self.down_steps * self.down_depths * TOKENS
        return pl.cdiv(rows, WGMMA_ROWS) * WGMMA_ROWS


class Inputs(NamedTuple):
    """The operands.

    Attributes:
      ids: int32 [T · K].
      weights: float32 [T · K].
      x: [x_rows, BLOCK].
      x_scale: float32, of the rows of x by block, else of the tokens; a multiple of WGMMA_ROWS.
      gate_up: [E, 2I, H].
      gate_up_scale: float32 [1 or E, 2I/128, H/128] by block, else [1 or E, 2I].
      down: [E, H, I].
      down_scale: float32, likewise.
      gate_up_bias: [E, 2I] or None.
      down_bias: [E, H] or None.
    """

    ids: Any
    weights: Any
    x: Any
    x_scale: Any
    gate_up: Any
    gate_up_scale: Any
    down: Any
    down_scale: Any
    gate_up_bias: Any
    down_bias: Any


class Between(NamedTuple):
    """What blocks leave for each other in global memory, for each expert hit in the order of the list.

    Attributes:
      h: float32 [most_hits · h_rows, BLOCK].
      rounded: the same in 8 bits.
      scale: float32 [most_hits · h_rows], of their rows.
    """

    h: Any
    rounded: Any
    scale: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      ring: of weights, [slots, SLOT_ROWS, BLOCK].
      full: [slots] barriers, complete when the copies of a slot have landed.
      empty: [slots] barriers, complete when a slot has been read.
      x: all of x, and room for what lies in the tensor cores' way behind its last tile.
      x_scale: of x, likewise.
      x_full: barrier, complete when x has landed.
      rows: ring of the rows of h of an expert in 8 bits, [rows_ahead · h_rows, BLOCK] and room behind.
      row_scale: their scales.
      rows_full: [rows_ahead] barriers.
      listed: barrier, complete when the list of experts has been made.
      experts: int32 [CHOICES], the list.
      num_hits: int32 [CHOICES], in all of it its length.
      choice_ids: int32 [CHOICES], −1 past the choices.
      choice_weights: float32 [CHOICES].
      choice_numbers: int32 [CHOICES].
      token_weights: float32 [TOKENS, CHOICES], what each token gives each expert of the list.
      h_staging: of a tile of h on its way out.
      rounded_staging: of rows in 8 bits on their way out.
      depth_sums: of each team, where it adds up what tiles of different depth gave, 8 columns at a time.
      y_share: what the second team has of a tile of y, 8 columns at a time.
      scaled: barrier, complete when x_scale has been written.
      shared: barrier, complete when y_share has been written.
      taken: barrier, complete when the first team has read it.
      y_staging: of a tile of y on its way out.
    """

    ring: Any
    full: Any
    empty: Any
    x: Any
    x_scale: Any
    x_full: Any
    rows: Any
    row_scale: Any
    rows_full: Any
    listed: Any
    experts: Any
    num_hits: Any
    choice_ids: Any
    choice_weights: Any
    choice_numbers: Any
    token_weights: Any
    h_staging: Any
    rounded_staging: Any
    depth_sums: Any
    y_share: Any
    scaled: Any
    shared: Any
    taken: Any
    y_staging: Any

    @classmethod
    def describe(cls, sizes: Sizes, dtype: jnp.dtype, out_dtype: jnp.dtype) -> "Scratch":
        """The types to allocate."""
        config, behind = sizes.config, WGMMA_ROWS - TOKENS
        h_columns = min(config.columns, BLOCK // 4)
        return cls(
            ring=swizzled((config.slots, SLOT_ROWS, BLOCK), dtype),
            full=plgpu.Barrier(num_arrivals=sizes.down_depths, num_barriers=config.slots),
            empty=plgpu.Barrier(num_barriers=config.slots),
            x=swizzled((sizes.x_rows + behind, BLOCK), dtype, any_row=False),
            x_scale=plgpu.SMEM((sizes.x_rows + behind if sizes.by_block else WGMMA_ROWS,), jnp.float32),
            x_full=plgpu.Barrier(num_arrivals=pl.cdiv(sizes.x_rows, MOST_COPIED)),
            rows=swizzled((config.rows_ahead * sizes.h_rows + behind, BLOCK), dtype, any_row=False),
            row_scale=plgpu.SMEM(
                (max(config.rows_ahead * sizes.h_rows + behind, TEAMS * 2 * WGMMA_ROWS),), jnp.float32
            ),
            rows_full=plgpu.Barrier(
                num_arrivals=2 * pl.cdiv(sizes.h_rows, MOST_COPIED), num_barriers=config.rows_ahead
            ),
            listed=plgpu.Barrier(),
            experts=plgpu.SMEM((CHOICES,), jnp.int32),
            num_hits=plgpu.SMEM((CHOICES,), jnp.int32),
            choice_ids=plgpu.SMEM((CHOICES,), jnp.int32),
            choice_weights=plgpu.SMEM((CHOICES,), jnp.float32),
            choice_numbers=plgpu.SMEM((CHOICES,), jnp.int32),
            token_weights=plgpu.SMEM((TOKENS, CHOICES), jnp.float32),
            h_staging=swizzled((TEAMS, 1, WGMMA_ROWS, h_columns), jnp.float32),
            rounded_staging=swizzled((TEAMS, 1, WGMMA_ROWS, BLOCK), dtype),
            depth_sums=swizzled((TEAMS, 2, 2 * WGMMA_ROWS, TOKENS), jnp.float32, any_row=False),
            y_share=swizzled((config.out_columns // TOKENS, WGMMA_ROWS, TOKENS), jnp.float32, any_row=False),
            scaled=plgpu.Barrier(),
            shared=plgpu.Barrier(),
            taken=plgpu.Barrier(),
            y_staging=YStaging.describe(config.out_columns, out_dtype),
        )


MOST_COPIED = 256
"""Rows, or numbers, of one copy."""


def slots_that_fit(sizes: Sizes, fast_memory_bytes: int) -> int:
    """Slots of the ring beside everything else."""
    config = sizes.config
    behind = WGMMA_ROWS - TOKENS
    rows = sizes.x_rows + config.rows_ahead * sizes.h_rows + 2 * behind
    h_columns = min(config.columns, BLOCK // 4)
    staging = WGMMA_ROWS * (TEAMS * (4 * h_columns + BLOCK) + 2 * 4 * config.out_columns)
    depth_sums = TEAMS * 2 * 2 * WGMMA_ROWS * TOKENS * 4
    left = fast_memory_bytes - _RESERVED_BYTES - rows * (BLOCK + 4) - staging - depth_sums
    return min(_MOST_SLOTS, left // (SLOT_ROWS * BLOCK)) // TEAMS * TEAMS


class YStaging:
    """Where a tile of y waits to be stored: as wide as a swizzle if one fits, as threads else share banks."""

    @staticmethod
    def describe(columns: int, dtype: jnp.dtype) -> Any:
        """The type to allocate."""
        swizzle = _widest_swizzle(columns, dtype)
        shape = (1, 1, WGMMA_ROWS, swizzle // dtype.itemsize if swizzle else columns)
        return swizzled(shape, dtype) if swizzle else plgpu.SMEM(shape, dtype)

    @staticmethod
    def views(staging: Any, columns: int, dtype: jnp.dtype) -> Views:
        """Its views."""
        return Views.of(staging) if _widest_swizzle(columns, dtype) else Views(staging, staging)


def _widest_swizzle(columns: int, dtype: jnp.dtype) -> int:
    return next((width for width in (128, 64, 32) if columns * dtype.itemsize % width == 0), 0)

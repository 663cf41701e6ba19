"""Shared memory of a block, its barriers, and how many slots of the ring fit beside the rest."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import Views, single_view, swizzled
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, CHOICES, SLOT_ROWS, TEAMS, TOKENS, Sizes

MOST_COPIED = 256
"""Rows, or numbers, of one copy."""

_MOST_SLOTS = 10
_RESERVED_BYTES = 8 * 1024
"""Barriers, choices, the list, and what stands between buffers for alignment."""


class Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      ring: of weights, [slots, SLOT_ROWS, BLOCK].
      full: [slots] barriers, complete when the copies of a slot have landed.
      empty: [slots] barriers, complete when a slot has been read.
      lhs: `x`, and later `rows` in its place.
      x_scale: of x.
      x_full: barrier, complete when x has landed.
      row_scale: of the rows of h.
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
      row_numbers: float32 [TEAMS, WGMMA_ROWS], on their way out: the largest numbers of rows of h, then their scales.
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
    lhs: Any
    x_scale: Any
    x_full: Any
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
    row_numbers: Any
    depth_sums: Any
    y_share: Any
    scaled: Any
    shared: Any
    taken: Any
    y_staging: Any

    @property
    def x(self) -> Any:
        """All of x, and room for what lies in the tensor cores' way behind its last tile."""
        return self.lhs[0]

    @property
    def rows(self) -> Any:
        """The ring of the rows of h of an expert in 8 bits, [rows_ahead · h_rows, BLOCK] and room behind.

        Copies to it begin when all blocks have multiplied x.
        """
        return self.lhs[1]

    @classmethod
    def describe(cls, sizes: Sizes, dtype: jnp.dtype, out_dtype: jnp.dtype) -> "Scratch":
        """The types to allocate."""
        config, behind = sizes.config, WGMMA_ROWS - TOKENS
        h_columns = min(config.columns, BLOCK // 4)
        lhs = [
            swizzled((num_rows + behind, BLOCK), dtype, any_row=False)
            for num_rows in (sizes.x_rows, config.rows_ahead * sizes.h_rows)
        ]
        return cls(
            ring=swizzled((config.slots, SLOT_ROWS, BLOCK), dtype),
            full=plgpu.Barrier(num_arrivals=sizes.down_depths, num_barriers=config.slots),
            empty=plgpu.Barrier(num_barriers=config.slots),
            lhs=lhs if single_view.get() else plgpu.RefUnion(*lhs),
            x_scale=plgpu.SMEM((sizes.x_rows + behind if sizes.by_block else WGMMA_ROWS,), jnp.float32),
            x_full=plgpu.Barrier(num_arrivals=pl.cdiv(sizes.x_rows, MOST_COPIED)),
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
            row_numbers=plgpu.SMEM((TEAMS, WGMMA_ROWS), jnp.float32),
            depth_sums=swizzled((TEAMS, 2, 2 * WGMMA_ROWS, TOKENS), jnp.float32, any_row=False),
            y_share=swizzled((config.out_columns // TOKENS, WGMMA_ROWS, TOKENS), jnp.float32, any_row=False),
            scaled=plgpu.Barrier(),
            shared=plgpu.Barrier(),
            taken=plgpu.Barrier(),
            y_staging=YStaging.describe(config.out_columns, out_dtype),
        )


def slots_that_fit(sizes: Sizes, fast_memory_bytes: int) -> int:
    """Slots of the ring beside everything else."""
    config = sizes.config
    behind = WGMMA_ROWS - TOKENS
    rows_of_h = config.rows_ahead * sizes.h_rows
    lhs = BLOCK * (max(sizes.x_rows, rows_of_h) + behind)
    numbers = 2 * TEAMS * WGMMA_ROWS  # of rows, on their way out and where they are compared
    scales = 4 * (sizes.x_rows + rows_of_h + 2 * behind + numbers)
    h_columns = min(config.columns, BLOCK // 4)
    staging = WGMMA_ROWS * (TEAMS * (4 * h_columns + BLOCK) + 2 * 4 * config.out_columns)
    depth_sums = TEAMS * 2 * 2 * WGMMA_ROWS * TOKENS * 4
    left = fast_memory_bytes - _RESERVED_BYTES - lhs - scales - staging - depth_sums
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

"""What the loading and the multiplying half of the Hopper kernel share: sizes, shared memory, and places in them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu.hopper.announce import Announcements
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config, Epilogue, Inputs
from pallas_kernels.grouped_matmul.gpu.tiles import Tile, Walk
from pallas_kernels.on_gpu.smem import SWIZZLE, Views, swizzled
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.quantize import SCALE_BLOCK
from pallas_kernels.stage import Stage

# The copy engine reads a vector only from every fourth float on. The scales of a tile's rows are therefore copied from
# the last such place before the tile, with some slack (as much as rounds the copy up to 128 bytes).
VECTOR_START = 4
VECTOR_SLACK = 32

_SIZES_ALIGNMENT = 32
"""Sizes of groups are copied into shared memory as a multiple of it: 128 bytes."""

FEW_SIZES = 16
"""Of so many or fewer groups the sizes are read where they lie."""

MOST_COPIED_SIZES = 256
"""As many as the copy engine takes at a time; more are read where they lie."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that follow from the operands and the configuration.

    Attributes:
      num_rows: M.
      num_groups: G.
      windows: column ranges of rhs that a tile reads: 2 for gate and up, which lie `out_columns` apart, else 1.
      out_columns: columns of the result.
      width: columns of a tile of the result.
      sweeps: sweeps over K that make the tile, each `sweep_width` columns of it.
      sweep_width: columns of the result that one sweep makes.
      wg_width: columns of these that are a math warpgroup's.
      wg_columns: columns of its accumulators.
      block_k: depth of one step.
      steps: steps of one sweep.
      k_major: whether K is the minor dimension of rhs.
      copied_sizes: sizes of groups that are copied into shared memory, rounded up; 0 if they are read where they lie.
      can_guess: whether each group may have one row tile, so that a block's first tile can be told without the sizes.
      steps_ahead: steps of a block's first tile whose weights are fetched before the kernel waits for the one before.
      launch_step: the step at which a block allows the next kernel; None if it never does.
      walk: the tiles.
    """

    num_rows: int
    num_groups: int
    windows: int
    out_columns: int
    width: int
    sweeps: int
    sweep_width: int
    wg_width: int
    wg_columns: int
    block_k: int
    steps: int
    k_major: bool
    copied_sizes: int
    can_guess: bool
    steps_ahead: int
    launch_step: int | None
    walk: Walk

    @classmethod
    def of(cls, inputs: Inputs, epilogue: Epilogue, config: Config, k_major: bool, num_blocks: int) -> "Shape":
        """The sizes of a product."""
        num_rows, depth = inputs.lhs.shape
        windows = 2 if epilogue.activation else 1
        out_columns, sweep_width = inputs.rhs.shape[1 if k_major else 2] // windows, config.block_n // windows
        width = SCALE_BLOCK if epilogue.requantizes else sweep_width
        block_k = SWIZZLE // inputs.lhs.dtype.itemsize
        num_sizes, num_groups = inputs.group_sizes.shape[0], inputs.rhs.shape[0]
        walk = Walk(num_sizes, num_rows, config.block_m, pl.cdiv(out_columns, width), config.strip)
        sweeps, steps = width // sweep_width, pl.cdiv(depth, block_k)
        can_guess = num_sizes == num_groups and num_rows <= num_groups * config.block_m
        tiles = pl.cdiv(walk.expected_tiles, num_blocks)
        return cls(
            num_rows=num_rows,
            num_groups=num_groups,
            windows=windows,
            out_columns=out_columns,
            width=width,
            sweeps=sweeps,
            sweep_width=sweep_width,
            wg_width=sweep_width // config.column_groups,
            wg_columns=config.block_n // config.column_groups,
            block_k=block_k,
            steps=steps,
            k_major=k_major,
            copied_sizes=_copied_sizes(num_sizes),
            can_guess=can_guess,
            steps_ahead=config.prefetch.ahead(min(config.num_stages, steps)) if can_guess else 0,
            launch_step=config.prefetch.begun(tiles * sweeps * steps),
            walk=walk,
        )


def _copied_sizes(num_sizes: int) -> int:
    """How many sizes to copy: of a few, the walk reads each once."""
    if not FEW_SIZES < num_sizes <= MOST_COPIED_SIZES:
        return 0
    return pl.cdiv(num_sizes, _SIZES_ALIGNMENT) * _SIZES_ALIGNMENT


class Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      lhs: ring [stages, row groups, 64, block_k].
      rhs: ring [stages, column groups, wg_columns, block_k] if K-major, else [stages, column groups, windows, block_k,
        wg_width].
      full: [stages] barriers, complete when every copy of a step has landed in its slot.
      empty: [stages] barriers, complete when every math warpgroup has read the slot.
      out: staging of the result, see `store_rows`.
      lhs_scales: ring of the rows' scales.
      row_scale: scales of the tile's rows.
      column_scale: scales of the tile's columns, [windows · width].
      bias: of the tile's columns, likewise.
      side_full: barrier, complete when the copies of a tile's row_scale, column_scale and bias have landed.
      side_empty: barrier, complete when every math warpgroup has read them.
      announcements: of the block's tiles.
      group_sizes: of all groups, [copied_sizes]; None where they are not copied.
      sizes_full: barrier, complete when they have been copied.
      ahead: [steps_ahead] barriers, complete when weights that were loaded before the wait have landed in their slots.
      out_scales: largest magnitudes and scales of the rows of an FP8 result, [warpgroups, 64].
      shared_scales: barrier between the column groups, twice a tile: their largest magnitudes in `out_scales` have been
        written, and have been read.
    """

    lhs: Any
    rhs: Any
    full: Any
    empty: Any
    out: Any
    lhs_scales: Any
    row_scale: Any
    column_scale: Any
    bias: Any
    side_full: Any
    side_empty: Any
    announcements: Announcements
    group_sizes: Any
    sizes_full: Any
    ahead: Any
    out_scales: Any
    shared_scales: Any

    @classmethod
    def describe(cls, inputs: Inputs, epilogue: Epilogue, config: Config, shape: Shape) -> "Scratch":
        """The types to allocate."""
        stages, groups = config.num_stages, config.warpgroups
        rhs_tile: tuple[int, ...] = (shape.wg_columns, shape.block_k)
        if not shape.k_major:
            rhs_tile = (shape.windows, shape.block_k, shape.wg_width)
        row_scales = config.block_m + VECTOR_SLACK
        by_row, by_column = epilogue.lhs_scale == "row", epilogue.rhs_scale == "channel"
        side = by_row + shape.windows * (by_column + (inputs.bias is not None))
        of_weights = config.column_groups * shape.windows
        loads = config.row_groups + of_weights + (epilogue.lhs_scale == "block")
        ahead = shape.steps_ahead if config.prefetch.mode == "smem" else 0
        out_chunk = min(SWIZZLE // epilogue.out_dtype.itemsize, shape.sweeps * shape.wg_width)
        sides = shape.windows * shape.width
        return cls(
            lhs=swizzled((stages, config.row_groups, WGMMA_ROWS, shape.block_k), inputs.lhs.dtype),
            rhs=swizzled((stages, config.column_groups, *rhs_tile), inputs.rhs.dtype, any_row=shape.k_major),
            full=plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            out=swizzled((groups, config.out_slots, WGMMA_ROWS, out_chunk), epilogue.out_dtype),
            lhs_scales=plgpu.SMEM((stages, row_scales), jnp.float32) if epilogue.lhs_scale == "block" else None,
            row_scale=plgpu.SMEM((row_scales,), jnp.float32) if by_row else None,
            column_scale=plgpu.SMEM((sides,), jnp.float32) if by_column else None,
            bias=None if inputs.bias is None else plgpu.SMEM((sides,), inputs.bias.dtype),
            side_full=plgpu.Barrier(num_arrivals=side) if side else None,
            side_empty=plgpu.Barrier(num_arrivals=groups) if side else None,
            announcements=Announcements.describe(groups),
            group_sizes=plgpu.SMEM((shape.copied_sizes,), jnp.int32) if shape.copied_sizes else None,
            sizes_full=plgpu.Barrier() if shape.copied_sizes else None,
            ahead=plgpu.Barrier(num_arrivals=of_weights, num_barriers=ahead) if ahead else None,
            out_scales=plgpu.SMEM((groups, WGMMA_ROWS), jnp.float32) if epilogue.requantizes else None,
            shared_scales=plgpu.Barrier(num_arrivals=groups) if epilogue.requantizes else None,
        )


class Block:
    """One block at work, on the device: what each of its warpgroups knows.

    Attributes:
      first_group: the group of rhs[0], from `begin` on.
    """

    first_group: jax.Array

    def __init__(
        self,
        inputs: Inputs,
        outs: Any,
        scratch: Scratch,
        epilogue: Epilogue,
        config: Config,
        shape: Shape,
        stage: Stage,
    ):
        self.inputs, self.outs, self.scratch = inputs, outs, scratch
        self.epilogue, self.config, self.shape, self.stage = epilogue, config, shape, stage
        self.lhs_tiles = Views.of(scratch.lhs)
        self.rhs_tiles = Views.of(scratch.rhs) if shape.k_major else Views(scratch.rhs, scratch.rhs)

    def begin(self):
        """Waits for the kernel before this one; until then nothing may be touched that it reads or writes."""
        self.config.prefetch.wait()
        self.first_group = self.inputs.group_offset[0]

    def weights_of(self, tile: Tile):
        """The index into rhs of the tile's group, and whether rhs holds it."""
        group = tile.group - self.first_group
        is_owned = (group >= 0) & (group < self.shape.num_groups) & (tile.group < self.shape.walk.num_groups)
        return jnp.clip(group, 0, self.shape.num_groups - 1), is_owned

    def column(self, tile: Tile, sweep: int, column_group):
        """The first column of the result that a column group makes in a sweep."""
        shape = self.shape
        return tile.column * shape.width + sweep * shape.sweep_width + column_group * shape.wg_width

    def scale_step(self, k):
        """The block of scales that a step lies in."""
        return lax.div(k * self.shape.block_k, jnp.int32(SCALE_BLOCK))

    def scale_group(self, group):
        """Where the scales of rhs[group] lie."""
        return group if self.inputs.rhs_scale.shape[0] > 1 else 0

    def slot(self, step):
        """The buffer of the ring that a step uses."""
        return lax.rem(step, jnp.int32(self.config.num_stages))


def vector_shift(tile: Tile) -> jax.Array:
    """Where the scale of the tile's first row lies among those that were copied."""
    return lax.rem(tile.row, jnp.int32(VECTOR_START))

"""The grouped matrix product on Hopper: a persistent kernel with one warpgroup that loads and one or two that multiply.

The loading warpgroup streams tiles of both operands through a ring of buffers in shared memory with the bulk copy
engine, from one output tile into the next without a pause. The math warpgroups multiply them with `wgmma`, each its
own rows or columns of the tile, and finish the tile in registers: scales, bias, activation, conversion.

    floor in time = max(bytes of lhs, rhs, out / HBM bandwidth, 2·M·K·N / peak)

Tiles begin at their group's first row, so no tile mixes groups. What a tile reads beyond its group (rows of the next
one, zeros past the end of the matrix) reaches no row that is stored: rows of a product do not depend on one another.
A remainder of K is filled with zeros by the copy engine, in both operands.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import Activation, gated
from pallas_kernels.grouped_matmul.hopper_smem import SWIZZLE, Views, swizzled
from pallas_kernels.grouped_matmul.hopper_store import store_rows, store_vector
from pallas_kernels.grouped_matmul.hopper_tiles import Tile, Walk
from pallas_kernels.quantize import finite_scale

WGMMA_ROWS = 64
"""Rows of a math warpgroup."""

SCALE_BLOCK = 128
"""Depth (and, for weights, width) of one scale block."""

Stage = Literal["full", "comp", "dma"]
"""What a kernel does: all of it, every multiplication on tiles that stay where they are, or every copy and no more."""

_STEPS_AT_ONCE = 4
"""Steps with block scales between which the tensor cores do not wait."""

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)

# The copy engine reads a vector only from every fourth float on. The scales of a tile's rows are therefore copied from
# the last such place before the tile, with some slack (as much as rounds the copy up to 128 bytes).
_VECTOR_START = 4
_VECTOR_SLACK = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_m: rows of an output tile: 64, or 64 for each math warpgroup, which otherwise split the columns.
      block_n: columns of the accumulators, at most 256; the fused gate/up kernel stores half as many.
      num_stages: buffers in the ring, each 128 bytes of K deep.
      warpgroups: math warpgroups, 1 or 2.
      strip: column tiles visited for one row tile before the next.
    """

    block_m: int
    block_n: int
    num_stages: int
    warpgroups: int
    strip: int

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
        """Whether the result is rounded to FP8; a tile of it must be 128 columns wide."""
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


def grouped_product(
    inputs: Inputs,
    epilogue: Epilogue,
    config: Config,
    *,
    k_major: bool,
    num_blocks: int,
    stage: Stage = "full",
) -> Any:
    """Runs the kernel.

    Returns:
      [M, N], or [M, N/2] with an activation; rows that no group of rhs owns are zeros. When the result is FP8, a pair
      of it and its scales, float32 [N/128, M] (N/256 with an activation), M rounded up to a multiple of 4.
    """
    shape = _Shape.of(inputs, epilogue, config, k_major)
    scratch = _Scratch.describe(inputs, epilogue, config, shape)

    outs = [jax.ShapeDtypeStruct((shape.num_rows, shape.out_columns), epilogue.out_dtype)]
    if epilogue.requantizes:
        assert shape.width == SCALE_BLOCK, "a tile of an FP8 result is one scale block wide"
        scale_rows = pl.cdiv(shape.num_rows, _VECTOR_START) * _VECTOR_START
        outs.append(jax.ShapeDtypeStruct((shape.out_columns // SCALE_BLOCK, scale_rows), jnp.float32))

    def body(*refs):
        num_inputs = len(Inputs._fields)
        block = _Block(Inputs(*refs[:num_inputs]), refs[num_inputs:-1], refs[-1], epilogue, config, shape, stage)
        warpgroup = lax.axis_index("warpgroup")
        for_each_tile = functools.partial(
            shape.walk.for_each, block.inputs.group_sizes, lax.axis_index("block"), num_blocks
        )

        @pl.when(warpgroup == config.warpgroups)
        def _():
            if config.warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")
            block.drain(*for_each_tile(block.load, (jnp.int32(0), jnp.int32(0))))

        @pl.when(warpgroup < config.warpgroups)
        def _():
            if config.warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
            for_each_tile(block.compute, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=outs if epilogue.requantizes else outs[0],
        scratch_types=[scratch],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="grouped_gate_up" if epilogue.activation else "grouped_matmul",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Wherever threads read what others of their warpgroup wrote, `commit_smem` stands between.
            unsafe_no_auto_barriers=True,
        ),
    )
    return kernel(*inputs)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes that follow from the operands and the configuration.

    Attributes:
      num_rows: M.
      num_groups: G.
      windows: column ranges of rhs that a tile reads: 2 for gate and up, which lie `out_columns` apart, else 1.
      out_columns: columns of the result.
      width: columns of a tile of the result.
      wg_width: columns of the result of a math warpgroup.
      wg_columns: columns of its accumulators.
      block_k: depth of one step.
      steps: steps of one tile.
      k_major: whether K is the minor dimension of rhs.
      walk: the tiles.
    """

    num_rows: int
    num_groups: int
    windows: int
    out_columns: int
    width: int
    wg_width: int
    wg_columns: int
    block_k: int
    steps: int
    k_major: bool
    walk: Walk

    @classmethod
    def of(cls, inputs: Inputs, epilogue: Epilogue, config: Config, k_major: bool) -> "_Shape":
        num_rows, depth = inputs.lhs.shape
        windows = 2 if epilogue.activation else 1
        out_columns, width = inputs.rhs.shape[1 if k_major else 2] // windows, config.block_n // windows
        block_k = SWIZZLE // inputs.lhs.dtype.itemsize
        num_sizes = inputs.group_sizes.shape[0]
        return cls(
            num_rows=num_rows,
            num_groups=inputs.rhs.shape[0],
            windows=windows,
            out_columns=out_columns,
            width=width,
            wg_width=width // config.column_groups,
            wg_columns=config.block_n // config.column_groups,
            block_k=block_k,
            steps=pl.cdiv(depth, block_k),
            k_major=k_major,
            walk=Walk(num_sizes, num_rows, config.block_m, pl.cdiv(out_columns, width), config.strip),
        )


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      lhs: ring [stages, row groups, 64, block_k].
      rhs: ring [stages, column groups, wg_columns, block_k] if K-major, else [stages, column groups, windows, block_k,
        wg_width].
      full: a ring buffer has been filled.
      empty: a ring buffer has been read.
      out: staging of the result, see `store_rows`.
      lhs_scales: ring of the rows' scales.
      row_scale: scales of the tile's rows.
      column_scale: scales of the tile's columns, [windows · width].
      bias: of the tile's columns, likewise.
      side_full: the three before have been filled.
      side_empty: and have been read.
      out_scales: largest magnitudes and scales of the rows of an FP8 result, [warpgroups, 64].
      shared_scales: the column groups have written their largest magnitudes.
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
    out_scales: Any
    shared_scales: Any

    @classmethod
    def describe(cls, inputs: Inputs, epilogue: Epilogue, config: Config, shape: _Shape) -> "_Scratch":
        """The types to allocate."""
        stages, groups = config.num_stages, config.warpgroups
        rhs_tile: tuple[int, ...] = (shape.wg_columns, shape.block_k)
        if not shape.k_major:
            rhs_tile = (shape.windows, shape.block_k, shape.wg_width)
        row_scales = config.block_m + _VECTOR_SLACK
        by_row, by_column = epilogue.lhs_scale == "row", epilogue.rhs_scale == "channel"
        side = by_row + shape.windows * (by_column + (inputs.bias is not None))
        loads = config.row_groups + config.column_groups * shape.windows + (epilogue.lhs_scale == "block")
        out_chunk = min(SWIZZLE // epilogue.out_dtype.itemsize, shape.wg_width)
        return cls(
            lhs=swizzled((stages, config.row_groups, WGMMA_ROWS, shape.block_k), inputs.lhs.dtype),
            rhs=swizzled((stages, config.column_groups, *rhs_tile), inputs.rhs.dtype, any_row=shape.k_major),
            full=plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            out=swizzled((groups, 2, WGMMA_ROWS, out_chunk), epilogue.out_dtype),
            lhs_scales=plgpu.SMEM((stages, row_scales), jnp.float32) if epilogue.lhs_scale == "block" else None,
            row_scale=plgpu.SMEM((row_scales,), jnp.float32) if by_row else None,
            column_scale=plgpu.SMEM((config.block_n,), jnp.float32) if by_column else None,
            bias=None if inputs.bias is None else plgpu.SMEM((config.block_n,), inputs.bias.dtype),
            side_full=plgpu.Barrier(num_arrivals=side) if side else None,
            side_empty=plgpu.Barrier(num_arrivals=groups) if side else None,
            out_scales=plgpu.SMEM((groups, WGMMA_ROWS), jnp.float32) if epilogue.requantizes else None,
            shared_scales=plgpu.Barrier(num_arrivals=groups) if epilogue.requantizes else None,
        )


class _Block:
    """One block at work. Runs on the device, in each of its warpgroups."""

    def __init__(self, inputs: Inputs, outs, scratch: _Scratch, epilogue, config, shape: _Shape, stage: Stage):
        self.inputs, self.outs, self.scratch = inputs, outs, scratch
        self.epilogue, self.config, self.shape, self.stage = epilogue, config, shape, stage
        self.first_group = inputs.group_offset[0]
        self.warpgroup = lax.axis_index("warpgroup")
        splits_rows = config.column_groups == 1
        self.row_group = self.warpgroup if splits_rows else 0
        self.column_group = 0 if splits_rows else self.warpgroup
        self.lhs_tiles = Views.of(scratch.lhs)
        self.rhs_tiles = Views.of(scratch.rhs) if shape.k_major else Views(scratch.rhs, scratch.rhs)
        self.staging = Views.of(scratch.out)

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load(self, tile: Tile, state):
        """Streams the operands of a tile into the ring; state: (steps so far, tiles so far)."""
        step, tiles = state
        group, is_owned = self._weights_of(tile)
        num_steps = jnp.where(is_owned, self.shape.steps, 0)
        if self.stage == "comp":  # fill the ring once
            num_steps = jnp.minimum(num_steps, self.config.num_stages - step)

        def one_step(k, step):
            slot = self._slot(step)

            @pl.when(step >= self.config.num_stages)
            def _():
                plgpu.barrier_wait(self.scratch.empty.at[slot])

            self._copy_operands(tile, group, k, slot)
            return step + 1

        with jax.named_scope("load"):
            step = lax.fori_loop(0, num_steps, one_step, step)
        if self.scratch.side_full is not None:

            @pl.when(is_owned)
            def _():
                @pl.when(tiles > 0)
                def _():
                    plgpu.barrier_wait(self.scratch.side_empty)

                self._copy_sides(tile, group)

        return step, tiles + is_owned.astype(jnp.int32)

    def drain(self, step, tiles):
        """Waits until all that was loaded has been read, so that no barrier is left half-way."""
        if self.stage != "comp":
            first = jnp.maximum(step - self.config.num_stages, 0)
            lax.fori_loop(first, step, lambda i, _: plgpu.barrier_wait(self.scratch.empty.at[self._slot(i)]), None)
        if self.scratch.side_full is not None:
            pl.when(tiles > 0)(lambda: plgpu.barrier_wait(self.scratch.side_empty))

    def _copy_operands(self, tile: Tile, group, k, slot):
        shape, full = self.shape, self.scratch.full.at[slot]
        depths = pl.ds(pl.multiple_of(k * shape.block_k, shape.block_k), shape.block_k)
        for i in range(self.config.row_groups):
            rows = pl.ds(tile.row + i * WGMMA_ROWS, WGMMA_ROWS)
            plgpu.copy_gmem_to_smem(self.inputs.lhs.at[rows, depths], self.lhs_tiles.copied.at[slot, i], full)
        for part, window, columns in self._windows(tile):
            rhs, ring = self.inputs.rhs, self.rhs_tiles.copied
            if shape.k_major:
                target = slice(window * shape.wg_width, (window + 1) * shape.wg_width)
                plgpu.copy_gmem_to_smem(rhs.at[group, columns, depths], ring.at[slot, part, target], full)
            else:
                plgpu.copy_gmem_to_smem(rhs.at[group, depths, columns], ring.at[slot, part, window], full)
        if self.epilogue.lhs_scale == "block":
            scales = self.inputs.lhs_scale.at[self._scale_step(k), self._scale_rows(tile)]
            plgpu.copy_gmem_to_smem(scales, self.scratch.lhs_scales.at[slot], full)

    def _copy_sides(self, tile: Tile, group):
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=self.scratch.side_full)
        if self.epilogue.lhs_scale == "row":
            copy(self.inputs.lhs_scale.at[self._scale_rows(tile)], self.scratch.row_scale)
        width = self.shape.width
        for window in range(self.shape.windows):
            column = pl.multiple_of(tile.column * width, width)
            columns = pl.ds(column + window * self.shape.out_columns, width)
            target = slice(window * width, (window + 1) * width)
            if self.epilogue.rhs_scale == "channel":
                copy(self.inputs.rhs_scale.at[self._scale_group(group), columns], self.scratch.column_scale.at[target])
            if self.inputs.bias is not None:
                copy(self.inputs.bias.at[group, columns], self.scratch.bias.at[target])

    # ---- multiplying -------------------------------------------------------------------------------------------------

    def compute(self, tile: Tile, step):
        """Multiplies, finishes and stores a tile; `step` counts the steps so far."""
        shape = self.shape
        group, is_owned = self._weights_of(tile)
        num_steps = jnp.where(is_owned, shape.steps, 0)
        row = tile.row + self.row_group * WGMMA_ROWS
        rows = jnp.clip(tile.rows - self.row_group * WGMMA_ROWS, 0, WGMMA_ROWS)
        if self.stage == "comp":  # in a way that the compiler does not see: nothing is stored
            rows = jnp.where(step < 0, rows, 0)

        def store(result):
            scale = None
            if self.epilogue.requantizes:
                result, scale = self._to_fp8(result)
            column = tile.column * shape.width + self.column_group * shape.wg_width
            store_rows(self.outs[0], self.staging, self.warpgroup, result, row=row, rows=rows, column=column)
            if scale is not None:
                column_rows = jnp.where(jnp.equal(self.column_group, 0), rows, 0)
                buffer = self.scratch.out_scales.at[self.warpgroup]
                store_vector(self.outs[1].at[tile.column], buffer, scale, row, column_rows)

        @pl.when(is_owned)
        def _():
            by_block = "block" in (self.epilogue.lhs_scale, self.epilogue.rhs_scale)
            with jax.named_scope("multiply"):
                total = (self._sum_by_block if by_block else self._sum)(tile, group, num_steps, step)
            with jax.named_scope("finish"):
                result = self._finish(total, tile, group)
            with jax.named_scope("store"):
                store(result)

        @pl.when(jnp.logical_not(is_owned))
        def _():
            zeros = jnp.zeros((WGMMA_ROWS, shape.wg_width), self._finished_dtype)
            store(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

        return step + num_steps

    def _sum(self, tile: Tile, group, num_steps, step):
        """The sum over K of this warpgroup's products: [64, wg_columns] in float32."""
        del tile, group
        last_slot = self.config.num_stages - 1

        def multiply_all(accumulator):
            def one_step(k, step):
                self._wait_full(step)
                self._multiply(accumulator, self._slot(step))
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    self._release(self._slot(step + last_slot))

                return step + 1

            lax.fori_loop(0, num_steps, one_step, step)
            total = accumulator[...]
            self._release(self._slot(step + num_steps + last_slot))
            return total

        return pl.run_scoped(multiply_all, plgpu.ACC((WGMMA_ROWS, self.shape.wg_columns), jnp.float32))

    def _sum_by_block(self, tile: Tile, group, num_steps, step):
        """The same, with the scales of each 128 of K applied to their part of the sum.

        Where the registers hold two parts they are both in flight: the tensor cores multiply one while the one before
        it is scaled and added.
        """
        shape = self.shape
        width = math.gcd(SCALE_BLOCK, shape.wg_width)  # of columns that surely share the scale of the weights
        pieces = [slice(i, i + width) for i in range(0, shape.wg_columns, width)]
        at_once = _STEPS_AT_ONCE if shape.wg_columns <= SCALE_BLOCK else 1

        def some_steps(first, count, totals):
            scales = [[self._weight_scale(tile, group, first + i, p.start) for p in pieces] for i in range(count)]

            def multiply_from(i, before, sums):
                """The steps from i on, while that before is in flight."""
                if i == count:
                    return add(i - 1, before, 0, sums)

                def multiply(accumulator):
                    self._wait_full(step + first + i)
                    self._multiply(accumulator, self._slot(step + first + i))
                    return multiply_from(i + 1, accumulator, sums if before is None else add(i - 1, before, 1, sums))

                return pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, shape.wg_columns), jnp.float32))

            def add(i, accumulator, in_flight, sums):
                part = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
                row_scale = self._row_scale(tile, self._slot(step + first + i))
                plgpu.commit_smem()  # the copy engine may overwrite what has been read
                self._release(self._slot(step + first + i))
                factors = [_along_rows(row_scale * scale, (WGMMA_ROWS, width)) for scale in scales[i]]
                return [total + part[:, p] * factor for total, p, factor in zip(sums, pieces, factors, strict=True)]

            return multiply_from(0, None, totals)

        zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
        totals, rounds = [zeros] * len(pieces), lax.div(num_steps, jnp.int32(at_once))
        totals = lax.fori_loop(0, rounds, lambda i, t: some_steps(i * at_once, at_once, t), totals)
        if at_once > 1:
            totals = lax.fori_loop(rounds * at_once, num_steps, lambda k, t: some_steps(k, 1, t), totals)
        return totals[0] if len(pieces) == 1 else lax.concatenate(totals, 1)

    def _row_scale(self, tile: Tile, slot) -> Any:
        """The block scales of this warpgroup's rows in a buffer of the ring."""
        if self.epilogue.lhs_scale != "block":
            return 1.0
        return plgpu.load(self.scratch.lhs_scales.at[slot, self._vector_rows(tile)], layout=_ROWS)

    def _multiply(self, accumulator, slot):
        if self.stage == "dma":
            return
        lhs = self.lhs_tiles.tiled.at[slot, self.row_group]
        if self.shape.k_major:
            rhs = self.rhs_tiles.tiled.at[slot, self.column_group]
            plgpu.wgmma(accumulator, lhs, rhs.transpose((1, 0)))
            return
        for window in range(self.shape.windows):
            columns = slice(window * self.shape.wg_width, (window + 1) * self.shape.wg_width)
            rhs = self.rhs_tiles.tiled.at[slot, self.column_group, window]
            plgpu.wgmma(accumulator.at[:, columns], lhs, rhs)

    def _weight_scale(self, tile: Tile, group, k, first_column: int) -> Any:
        """The scale of this warpgroup's columns from `first_column` on, up to the next 128, at step k."""
        if self.epilogue.rhs_scale != "block":
            return 1.0
        shape, scales = self.shape, self.inputs.rhs_scale
        window, offset = divmod(first_column, shape.wg_width)
        column = tile.column * shape.width + self.column_group * shape.wg_width + offset + window * shape.out_columns
        block = jnp.minimum(lax.div(column, jnp.int32(SCALE_BLOCK)), scales.shape[1] - 1)
        return scales[self._scale_group(group), block, self._scale_step(k)]

    # ---- finishing ---------------------------------------------------------------------------------------------------

    def _finish(self, total, tile: Tile, group):
        """Scales, bias and activation: [64, wg_columns] in float32 -> [64, wg_width], ready to be stored."""
        epilogue, scratch, width = self.epilogue, self.scratch, self.shape.wg_width
        if scratch.side_full is not None:
            plgpu.barrier_wait(scratch.side_full)
        scale: Any = 1.0
        if epilogue.lhs_scale == "tensor":
            scale = self.inputs.lhs_scale[0]
        if epilogue.rhs_scale == "tensor":
            scale = scale * self.inputs.rhs_scale[self._scale_group(group)]
        if epilogue.lhs_scale == "row":
            scale = plgpu.load(scratch.row_scale.at[self._vector_rows(tile)], layout=_ROWS) * scale
        if "tensor" in (epilogue.lhs_scale, epilogue.rhs_scale) or epilogue.lhs_scale == "row":
            total = total * _along_rows(scale, total.shape)

        def along_columns(ref, window):
            mine = pl.ds(window * self.shape.width + self.column_group * width, width)
            values = plgpu.load(ref.at[mine], layout=_COLUMNS).astype(jnp.float32)
            return lax.broadcast_in_dim(values, (WGMMA_ROWS, width), (1,))

        parts = []
        for window in range(self.shape.windows):
            part = total[:, window * width : (window + 1) * width]
            if epilogue.rhs_scale == "channel":
                part = part * along_columns(scratch.column_scale, window)
            if self.inputs.bias is not None:
                part = part + along_columns(scratch.bias, window)
            parts.append(part)
        if scratch.side_full is not None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.side_empty)
        if epilogue.activation is None:
            return parts[0].astype(self._finished_dtype)
        gate, up = parts
        return gated(gate, up, epilogue.activation, epilogue.activation_limit).astype(self._finished_dtype)

    @property
    def _finished_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32) if self.epilogue.requantizes else self.epilogue.out_dtype

    def _to_fp8(self, value):
        """A result [64, wg_width] as FP8, and the scales of its rows: what `quantize` does with scaling "1x128"."""
        dtype, buffer = self.epilogue.out_dtype, self.scratch.out_scales
        largest = float(jnp.finfo(dtype).max)
        amax = jnp.max(jnp.abs(value), axis=1)
        if self.config.column_groups > 1:
            buffer[self.warpgroup] = amax
            plgpu.barrier_arrive(self.scratch.shared_scales)
            plgpu.barrier_wait(self.scratch.shared_scales)
            amax = jnp.maximum(amax, plgpu.load(buffer.at[1 - self.warpgroup], layout=_ROWS))
            plgpu.barrier_arrive(self.scratch.shared_scales)
            plgpu.barrier_wait(self.scratch.shared_scales)
        scale = finite_scale(amax, dtype)
        scaled = value * _along_rows(1 / scale, value.shape)
        return jnp.clip(scaled, -largest, largest).astype(dtype), scale

    # ---- places ------------------------------------------------------------------------------------------------------

    def _weights_of(self, tile: Tile):
        """The index into rhs of the tile's group, and whether rhs holds it."""
        group = tile.group - self.first_group
        is_owned = (group >= 0) & (group < self.shape.num_groups) & (tile.group < self.shape.walk.num_groups)
        return jnp.clip(group, 0, self.shape.num_groups - 1), is_owned

    def _windows(self, tile: Tile):
        """The tile's columns in rhs: (column group, window, dynamic slice) for each copy."""
        shape = self.shape
        for part in range(self.config.column_groups):
            column = pl.multiple_of(tile.column * shape.width + part * shape.wg_width, shape.wg_width)
            for window in range(shape.windows):
                yield part, window, pl.ds(column + window * shape.out_columns, shape.wg_width)

    def _vector_rows(self, tile: Tile):
        """Where the scales of this warpgroup's rows lie among those that `_scale_rows` copied."""
        return pl.ds(_vector_shift(tile) + self.row_group * WGMMA_ROWS, WGMMA_ROWS)

    def _scale_rows(self, tile: Tile):
        first = pl.multiple_of(tile.row - _vector_shift(tile), _VECTOR_START)
        return pl.ds(first, self.config.block_m + _VECTOR_SLACK)

    def _scale_step(self, k):
        return lax.div(k * self.shape.block_k, jnp.int32(SCALE_BLOCK))

    def _scale_group(self, group):
        return group if self.inputs.rhs_scale.shape[0] > 1 else 0

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.config.num_stages))

    def _wait_full(self, step):
        def wait():
            plgpu.barrier_wait(self.scratch.full.at[self._slot(step)])

        if self.stage == "comp":
            pl.when(step < self.config.num_stages)(wait)
        else:
            wait()

    def _release(self, slot):
        if self.stage != "comp":
            plgpu.barrier_arrive(self.scratch.empty.at[slot])


def _vector_shift(tile: Tile) -> jax.Array:
    """Where the scale of the tile's first row lies among those that were copied."""
    return lax.rem(tile.row, jnp.int32(_VECTOR_START))


def _along_rows(scale: Any, shape: tuple[int, ...]) -> Any:
    """One number for all rows, or one for each, as a factor of a tile."""
    return lax.broadcast_in_dim(scale, shape, (0,)) if jnp.ndim(scale) else scale

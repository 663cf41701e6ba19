"""The pullback of the gated activation with columns in 8 bits on Hopper, for gradients of weights, in one pass.

    floor in time = R · I · (3 · 2 bytes read + 2 + 2 + 1 bytes written) / HBM bandwidth

A tile is a block of at most 128 rows of one group and 128 columns of gate, with the same of up and of the cotangent:
96 KB, which the copy engine brings while the tile before is worked on. That is what is on its way on a core at any
time; Little's law asks for some 40 KB.

The warpgroups share a tile twice, as `tile.py` says: first by rows, then by columns.

What is stored by rows depends on nothing but the row. So the last block of a group stores the rows behind its group
too, as their own block does, with the same bits. Blocks that go on past the last row of all store none; one more block
stores the last 128 rows then, and nothing else.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import Activation
from pallas_kernels.chips import Chip
from pallas_kernels.columns import BLOCK, Columns, first_blocks, padded_rows
from pallas_kernels.gated_activation import reference
from pallas_kernels.gated_activation.formulas import with_derivatives
from pallas_kernels.gated_activation.gpu.tile import SLOTS, Place, Problem, Results, Scratch, Worker
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.rounding import FP8
from pallas_kernels.quantize import QTensor


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      warpgroups: that share a tile, 2 or 4.
    """

    warpgroups: int = 4


class _Blocks(NamedTuple):
    """Where the blocks lie.

    Attributes:
      places: int32 [2, B]: the first row of each, and how many of its rows are its group's.
      in_use: int32 [1], how many blocks there are.
      weights: float32 [B, 128], those of the rows of each, or None.
    """

    places: jax.Array
    in_use: jax.Array
    weights: jax.Array | None

    @classmethod
    def of(cls, group_sizes: jax.Array, row_weights: jax.Array | None, num_rows: int) -> "_Blocks":
        """The blocks of groups of `num_rows` rows in all."""
        sizes = jnp.maximum(group_sizes.astype(jnp.int32), 0)
        ends, firsts = jnp.cumsum(sizes, dtype=jnp.int32), first_blocks(sizes)
        block = jnp.arange(padded_rows(num_rows, sizes.shape[0]) // BLOCK + 1, dtype=jnp.int32)
        group = jnp.minimum((firsts[1:] <= block[:, None]).sum(1, dtype=jnp.int32), sizes.shape[0] - 1)
        row = (ends - sizes)[group] + (block - firsts[group]) * BLOCK
        is_a_groups = block < firsts[-1]
        row, rows = jnp.where(is_a_groups, row, num_rows - BLOCK), jnp.where(is_a_groups, ends[group] - row, 0)
        goes_past = jnp.any(row > num_rows - BLOCK).astype(jnp.int32)
        weights = None
        if row_weights is not None:
            weights = row_weights[jnp.minimum(row[:, None] + jnp.arange(BLOCK, dtype=jnp.int32), num_rows - 1)]
        return cls(jnp.stack([row, jnp.minimum(rows, BLOCK)]), firsts[-1:] + goes_past, weights)


def gated_activation_pullback_with_columns(
    h: jax.Array,
    dout: jax.Array,
    row_weights: jax.Array | None,
    group_sizes: jax.Array,
    *,
    activation: Activation,
    limit: float | None,
    in_8_bits: jnp.dtype,
    result_in_8_bits: jnp.dtype,
    with_weights: bool,
    config: Config | None = None,
) -> tuple[QTensor, Columns, Columns, jax.Array | None]:
    """See `pallas_kernels.gated_activation.reference`; `config` is for tuning.

    The logistic function is correct to some 1e-6 of it, as is therefore what is rounded.
    """
    chip = hopper_chip("gated_activation_pullback_with_columns")
    if not _fits(h, dout, [in_8_bits, result_in_8_bits]):
        options: Any = {"activation": activation, "limit": limit, "in_8_bits": in_8_bits, "with_weights": with_weights}
        return reference.gated_activation_pullback_with_columns(
            h, dout, row_weights, group_sizes, **options, result_in_8_bits=result_in_8_bits
        )
    config = config or Config()
    problem = Problem(
        num_rows=dout.shape[0],
        columns=dout.shape[1],
        dtype=h.dtype,
        in_8_bits=in_8_bits,
        result_in_8_bits=result_in_8_bits,
        warpgroups=config.warpgroups,
        formulas=functools.partial(with_derivatives, activation=activation, limit=limit),
    )
    blocks = _Blocks.of(group_sizes, row_weights, problem.num_rows)
    outs = _outs(problem, padded_rows(problem.num_rows, group_sizes.shape[0]), with_weights)
    num_programs = min(blocks.places.shape[1] * problem.chunks, _most_programs(chip))
    inputs = [h, dout, *blocks[: 2 if row_weights is None else 3]]

    def body(*refs):
        pre, gradient, places, in_use, *weights = refs[: len(inputs)]
        out, scratch = Results(**dict(zip(outs, refs[len(inputs) : -1], strict=True))), refs[-1]
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        worker = Worker(problem, warpgroup, pre, gradient, weights[0] if weights else None, out, scratch)
        total = in_use[0] * problem.chunks
        steps = lax.div(jnp.maximum(total - program + num_programs - 1, 0), jnp.int32(num_programs))

        def place(step) -> Place:
            tile = jnp.minimum(program + step * num_programs, total - 1)
            block = lax.div(tile, problem.chunks)
            return Place(block, lax.rem(tile, problem.chunks), places[0, block], places[1, block])

        def one_tile(step, state):
            """Works on the first of two tiles, and asks for the one after them, of which it hears meanwhile."""
            at, ahead = state
            further, slot = place(step + SLOTS), lax.rem(step, SLOTS)
            plgpu.barrier_wait(scratch.full.at[slot])
            pl.when(at.row <= problem.num_rows - BLOCK)(lambda: worker.store_by_rows(slot, at))
            pl.when(at.num_owned > 0)(lambda: worker.store_by_columns(slot, at))
            plgpu.commit_smem()  # the copy engine may overwrite what has been read
            plgpu.barrier_arrive(scratch.empty.at[slot])
            plgpu.barrier_wait(scratch.empty.at[slot])
            pl.when(step + SLOTS < steps)(lambda: worker.fetch(slot, further))
            return ahead, further

        @pl.when(steps > 0)
        def _():
            state = place(0), place(1)
            for step, at in enumerate(state):
                pl.when(step < steps)(functools.partial(worker.fetch, step, at))
            lax.fori_loop(0, steps, one_tile, state)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    results = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[Scratch.describe(problem)],
        kernel_name="gated_activation_pullback_with_columns",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=0,  # no sum and no maximum goes across warps
        ),
    )(*inputs)
    found = Results(**dict(zip(outs, results, strict=True)))
    return (
        QTensor(found.rows, found.row_scale.T),
        Columns(found.dh, found.dh_scale),
        Columns(found.result, found.result_scale),
        found.shares.sum(0) if with_weights else None,
    )


def _outs(problem: Problem, padded: int, with_weights: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The types of `Results`."""
    num_rows, columns, chunks, blocks = problem.num_rows, problem.columns, problem.chunks, padded // BLOCK
    outs = {
        "rows": jax.ShapeDtypeStruct((num_rows, 2 * columns), problem.in_8_bits),
        "row_scale": jax.ShapeDtypeStruct((2 * chunks, num_rows), jnp.float32),
        "dh": jax.ShapeDtypeStruct((2 * columns, padded), problem.in_8_bits),
        "dh_scale": jax.ShapeDtypeStruct((blocks, 2 * columns), jnp.float32),
        "result": jax.ShapeDtypeStruct((columns, padded), problem.result_in_8_bits),
        "result_scale": jax.ShapeDtypeStruct((blocks, columns), jnp.float32),
    }
    if with_weights:
        outs["shares"] = jax.ShapeDtypeStruct((chunks, num_rows), jnp.float32)
    return outs


def _fits(h: jax.Array, dout: jax.Array, in_8_bits: list[jnp.dtype]) -> bool:
    """Whether the kernel takes this; few rows, odd sizes and other dtypes are left to XLA."""
    num_rows, columns = dout.shape
    is_cut = num_rows >= BLOCK and columns > 0 and columns % BLOCK == 0
    return is_cut and h.dtype == dout.dtype and h.dtype.itemsize == 2 and all(x.name in FP8 for x in in_8_bits)


def _most_programs(chip: Chip) -> int:
    return chip.cores

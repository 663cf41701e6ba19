"""The grouped matrix product on Hopper: a persistent kernel with one warpgroup that loads and one or two that multiply.

The loading warpgroup streams tiles of both operands through a ring of buffers in shared memory with the bulk copy
engine, from one output tile into the next without a pause. The math warpgroups multiply them with `wgmma`, each its
own rows or columns of the tile, and finish the tile in registers: scales, bias, activation, conversion.

                      full[slot]: every copy of the step has landed
               +-----------------------------------------------------+
               |                                                     v
    +---------------------+    +--------+--------+-----+----------+    +-------------------------+
    |  loading warpgroup  | => | slot 0 | slot 1 | ... | slot S-1 | => | 1 or 2 math warpgroups  | => out
    |  (load.Loader)      |    +--------+--------+-----+----------+    | (multiply.Multiplier)   |
    +---------------------+      lhs, rhs, block scales of a step      +-------------------------+
               ^                                                     |
               +-----------------------------------------------------+
                      empty[slot]: every math warpgroup has read it

Step s of a block, counted over all of its tiles, uses slot s mod S, S = config.num_stages. The loader is thus at most S
steps ahead. Once a tile, the operands that belong to no step (scales of rows and columns, bias) travel the same way
through one buffer each, with the barriers side_full and side_empty. The loader finds the tiles, and tells the others of
them (`announce`); of many groups it copies the sizes first, with the barrier sizes_full, to have them at hand.

    floor in time = max(bytes of lhs, rhs, out / HBM bandwidth, 2·M·K·N / peak)

Tiles begin at their group's first row, so no tile mixes groups. What lies in a tile beyond its group (rows of the next
one, zeros past the end of the matrix, what the buffer held before) reaches no row that is stored: rows of a product do
not depend on one another. Of lhs no more rows are copied than a tile needs, rounded up to a few sizes.
A remainder of K is filled with zeros by the copy engine, in both operands.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu.hopper.block import VECTOR_START, Scratch, Shape
from pallas_kernels.grouped_matmul.gpu.hopper.load import Loader
from pallas_kernels.grouped_matmul.gpu.hopper.multiply import Multiplier
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config, Epilogue, Inputs
from pallas_kernels.quantize import SCALE_BLOCK
from pallas_kernels.stage import Stage


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
    shape = Shape.of(inputs, epilogue, config, k_major, num_blocks)
    scratch = Scratch.describe(inputs, epilogue, config, shape)
    if shape.copied_sizes:
        padding = (0, shape.copied_sizes - inputs.group_sizes.shape[0])
        inputs = inputs._replace(group_sizes=jnp.pad(inputs.group_sizes, padding))

    outs = [jax.ShapeDtypeStruct((shape.num_rows, shape.out_columns), epilogue.out_dtype)]
    if epilogue.requantizes:
        scale_rows = pl.cdiv(shape.num_rows, VECTOR_START) * VECTOR_START
        outs.append(jax.ShapeDtypeStruct((shape.out_columns // SCALE_BLOCK, scale_rows), jnp.float32))

    def body(*refs):
        num_inputs = len(Inputs._fields)
        operands, outs, memory = Inputs(*refs[:num_inputs]), refs[num_inputs:-1], refs[-1]
        block = operands, outs, memory, epilogue, config, shape, stage
        warpgroup, number = lax.axis_index("warpgroup"), lax.axis_index("block")

        tiles = memory.announcements

        # The loader only finds tiles, issues copies and waits: it hands most of its registers to those that hold
        # accumulators.
        @pl.when(warpgroup == config.warpgroups)
        def _():
            if config.warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")
            loader = Loader(*block)
            loader.fetch_ahead(number)
            loader.begin()
            loader.copy_sizes()
            loader.prefetch(number)
            sizes = operands.group_sizes
            if shape.copied_sizes:
                sizes = memory.group_sizes
                plgpu.barrier_wait(memory.sizes_full)

            def load(tile, state):
                count, loaded = state
                tiles.tell(count, tile)
                return count + 1, loader.load(tile, loaded)

            none = jnp.int32(0)
            count, loaded = shape.walk.for_each(sizes, number, num_blocks, load, (none, (none, none)))
            loader.finish()
            tiles.end(count)
            loader.drain(*loaded)

        @pl.when(warpgroup < config.warpgroups)
        def _():
            if config.warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
            tiles.for_each(Multiplier(*block).compute, jnp.int32(0))
            # The last stores may still be reading their staging buffers.
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

"""The experts of one to eight tokens in one kernel: gate/up, activation, down and the weighted sum, onto a residual.

    floor in time = bytes of the weights of the experts that are hit / HBM bandwidth

A block for each multiprocessor; in each, one warpgroup streams weights through a ring (`load.Loader`) and two multiply
(`team.run_team`). All tokens are multiplied with every expert that any of them chose, which costs nothing: the
tensor cores take 64 rows, and wait for weights.

    list     each block lists the experts that are hit (`hits`)
    gate/up  tiles of h, as many for each block               -> h in float32, by row its largest
    wait     until all blocks have done so
    round    rows of h to 8 bits                              -> h in 8 bits, scales
    wait     until that is done; down's weights are on their way since gate/up's have come
    down     each block its columns of y, summed over the experts, and onto the residual

Depths. The tensor cores take 64 rows, and tokens are 8. The rows of x lie in tiles of 8 tokens and 128 columns, one
depth below the other, and so do the rows of weights in a slot of the ring, for the same depths:

    x, 64 rows                weights, 128 rows             their product
    8 tokens, depth 0         16 columns, depth 0           | 0·0  0·1  …   7 |
    8 tokens, depth 1         16 columns, depth 1           | 1·0  1·1        |
    …                         …                             | …         …     |
    8 tokens, depth 7         16 columns, depth 7           | 7            7·7|

One product multiplies every depth with every depth. Those on the diagonal are wanted: each row has its own depth, its
scale and that of the weights' depth are applied, and only when a tile is done are the depths added up. Rows of a
product do not depend on one another, so that what else lies there, be it NaN, does no harm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.routed_mlp.gpu.load import Loader
from pallas_kernels.routed_mlp.gpu.scratch import Scratch
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, TEAMS, Between, Inputs, Sizes
from pallas_kernels.routed_mlp.gpu.team import run_team
from pallas_kernels.routed_mlp.gpu.walk import Phases


def launch(inputs: Inputs, sizes: Sizes, out_dtype: jnp.dtype, launches: list[Phases]) -> jax.Array:
    """Runs the phases, all in one launch or one in each: [T, H]."""
    rows = sizes.most_hits * sizes.h_rows
    dtype = inputs.x.dtype
    made: dict[str, Any] = {}
    shapes = {
        "h": jax.ShapeDtypeStruct((rows, BLOCK), jnp.float32),
        "largest": jax.ShapeDtypeStruct((sizes.most_hits * sizes.up_groups * WGMMA_ROWS,), jnp.float32),
        "rounded": jax.ShapeDtypeStruct((rows, BLOCK), dtype),
        "scale": jax.ShapeDtypeStruct((rows,), jnp.float32),
        "y": jax.ShapeDtypeStruct((sizes.num_tokens, sizes.hidden), out_dtype),
    }
    for phases in launches:
        made |= _launch(inputs, made, shapes, sizes, phases)
    return made["y"]


def _launch(
    inputs: Inputs, made: dict[str, Any], shapes: dict[str, Any], sizes: Sizes, phases: Phases
) -> dict[str, Any]:
    makes = [
        *(["h"] if phases.up else []),
        *(["largest"] if phases.up and not sizes.by_block else []),
        *(["rounded", "scale"] if phases.rounding else []),
        *(["y"] if phases.down else []),
    ]

    def body(given, made, *refs):
        *outs, scratch = refs
        refs_of = dict.fromkeys(shapes) | made | dict(zip(makes, outs, strict=True))
        y = refs_of.pop("y")
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        @pl.when(warpgroup < TEAMS)
        def _():
            run_team(given, Between(**refs_of), y, scratch, sizes, block, phases)

        @pl.when(warpgroup == TEAMS)
        def _():
            Loader(given, scratch, sizes, block).run(phases)

    kernel = plgpu.kernel(
        body,
        out_type=[shapes[name] for name in makes],
        scratch_types=[Scratch.describe(sizes, inputs.x.dtype, shapes["y"].dtype)],
        grid=(sizes.config.blocks,),
        grid_names=("block",),
        num_threads=TEAMS + 1,
        thread_name="warpgroup",
        kernel_name="routed_mlp",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return dict(zip(makes, kernel(inputs, made), strict=True))

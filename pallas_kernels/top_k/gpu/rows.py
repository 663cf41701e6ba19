"""Rows of a power of two scores, each in neighbouring threads of a warp: a block for a few of them.

A thread has 8 scores of one row, so that a round takes it few instructions, and as many blocks as can work at a time
share the tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.strips import in_blocks, launch, rows_in_blocks, spread, store
from pallas_kernels.top_k.gpu.rounds import Rounds

_LEAST_EXPERTS = 8
_MOST_EXPERTS = 128  # of rows that a warp has two of


def fits(scores: jax.Array) -> bool:
    """Whether there are such rows, and as many as a block takes."""
    num_tokens, num_experts = scores.shape
    is_power = num_experts.bit_count() == 1 and _LEAST_EXPERTS <= num_experts <= _MOST_EXPERTS
    return is_power and num_tokens >= rows_in_blocks(num_experts)


def choose(scores: jax.Array, rounds: Rounds, *, with_weights: bool) -> list[jax.Array]:
    """Ids [T, K], and their weights [T, K] if wanted."""
    num_tokens, num_experts = scores.shape
    rows, layout = rows_in_blocks(num_experts), in_blocks(num_experts)

    def body(scores, ids, *weights):
        # The last block starts early enough to end with the rows: what two blocks share they both find.
        tokens = pl.ds(jnp.minimum(lax.axis_index("block") * rows, num_tokens - rows), rows)
        chosen = rounds(plgpu.load(scores.at[tokens], layout=layout, optimized=False), layout, spread)
        for i, place in enumerate(chosen.ids):
            store(ids.at[tokens, i], place)
            if with_weights:
                weight = chosen.weights[i]
                store(weights[0].at[tokens, i], weight if chosen.total is None else weight / chosen.total)

    dtypes: tuple[Any, ...] = (jnp.int32, jnp.float32) if with_weights else (jnp.int32,)
    outs = [jax.ShapeDtypeStruct((num_tokens, rounds.k), dtype) for dtype in dtypes]
    return launch(body, outs, scores, name="top_k", blocks=pl.cdiv(num_tokens, rows))

"""Rows of any number of scores: those of 64 tokens in a warpgroup's registers, as `wgmma` has them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import Views, swizzled
from pallas_kernels.on_gpu.store import store_rows
from pallas_kernels.on_gpu.strips import launch
from pallas_kernels.on_gpu.wgmma import along_rows
from pallas_kernels.top_k.gpu.rounds import Rounds

TOKENS = 64
"""Of a block."""

_COLUMNS = 8  # of the choices that are stored together


def choose(scores: jax.Array, rounds: Rounds, *, with_weights: bool) -> list[jax.Array]:
    """Ids [T, K], and their weights [T, K] if wanted."""
    run = _of_few_tokens if scores.shape[0] < TOKENS else _of_many_tokens
    dtypes = (jnp.int32, jnp.float32) if with_weights else (jnp.int32,)
    return run(scores, rounds, pl.cdiv(rounds.k, _COLUMNS), dtypes)


def _of_many_tokens(scores: jax.Array, rounds: Rounds, parts: int, dtypes: Sequence[Any]) -> list[jax.Array]:
    """A block for every 64 tokens, whose scores go straight to the registers."""
    num_tokens = scores.shape[0]

    def body(scores, *outs):
        # The last block starts early enough to end with the rows: what two blocks share they both find.
        begin = jnp.minimum(lax.axis_index("block") * TOKENS, num_tokens - TOKENS)
        tile = pl.ds(begin, TOKENS)
        chosen = _in_columns(plgpu.load(scores.at[tile, :], layout=plgpu.Layout.WGMMA, optimized=False), rounds)
        for out, values in zip(outs, chosen, strict=False):
            for part, value in enumerate(values):
                out[part, tile] = value

    outs = [jax.ShapeDtypeStruct((parts, num_tokens, _COLUMNS), dtype) for dtype in dtypes]
    chosen = launch(body, outs, scores, name="top_k", blocks=pl.cdiv(num_tokens, TOKENS))
    return [x.transpose(1, 0, 2).reshape(num_tokens, -1)[:, : rounds.k] for x in chosen]


def _of_few_tokens(scores: jax.Array, rounds: Rounds, parts: int, dtypes: Sequence[Any]) -> list[jax.Array]:
    """One block, and the rows of a tile in shared memory: those past the tokens are whatever lies there."""
    num_tokens, num_experts = scores.shape

    def body(scores, *refs):
        *outs, tile, staging, copied = refs
        plgpu.copy_gmem_to_smem(scores, tile.at[:num_tokens], copied)
        plgpu.barrier_wait(copied)
        chosen = _in_columns(plgpu.load(tile, layout=plgpu.Layout.WGMMA, optimized=False), rounds)
        for out, buffer, values in zip(outs, staging, chosen, strict=False):
            for part, value in enumerate(values):
                column = part * _COLUMNS
                store_rows(out, Views.of(buffer), 0, value, row=0, rows=num_tokens, column=column)
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((TOKENS, num_experts), jnp.float32),
        [swizzled((1, parts, TOKENS, _COLUMNS), dtype) for dtype in dtypes],
        plgpu.Barrier(),
    ]
    outs = [jax.ShapeDtypeStruct((num_tokens, parts * _COLUMNS), dtype) for dtype in dtypes]
    chosen = launch(body, outs, scores, name="top_k", blocks=1, scratch=scratch)
    return [x[:, : rounds.k] for x in chosen]


def _in_columns(scores: jax.Array, rounds: Rounds) -> tuple[list[jax.Array], list[jax.Array]]:
    """Ids and weights of 64 rows of scores, 8 columns of them at a time."""
    column = plgpu.broadcasted_iota(jnp.int32, (TOKENS, _COLUMNS), 1, layout=plgpu.Layout.WGMMA)
    chosen = rounds(scores, plgpu.Layout.WGMMA, along_rows)

    def joined(values: list[jax.Array]) -> list[jax.Array]:
        parts: list[jax.Array] = []
        for i, value in enumerate(values):
            value = along_rows(value, _COLUMNS)
            if i % _COLUMNS:
                parts[-1] = jnp.where(column == i % _COLUMNS, value, parts[-1])
            else:
                parts.append(value)
        return parts

    weights = joined(chosen.weights)
    if chosen.total is not None:
        total = along_rows(chosen.total, _COLUMNS)
        weights = [weight / total for weight in weights]
    return joined(chosen.ids), weights

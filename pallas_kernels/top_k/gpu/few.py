"""Rows fewer than a block of `rows` has: through shared memory, where those past the last are whatever lies there."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.strips import launch, spread, store
from pallas_kernels.top_k.gpu import rows
from pallas_kernels.top_k.gpu.rounds import Rounds

_COPIED_BYTES = 128  # in multiples of which the copy engine fills shared memory
_VECTOR = 4  # numbers of 16 bytes, in multiples of which it empties it


def fits(scores: jax.Array) -> bool:
    """Whether the rows are such, and the copy engine can bring them."""
    num_tokens, num_experts = scores.shape
    is_few = rows.is_power(num_experts) and 0 < num_tokens < rows.of_block(num_experts)
    return is_few and scores.nbytes % _COPIED_BYTES == 0


def choose(
    scores: jax.Array, rounds: Rounds, *, with_weights: bool, ranking: jax.Array | None = None
) -> list[jax.Array]:
    """Ids [T, K], and their weights [T, K] if wanted: scores where `ranking`, if given, is best."""
    num_tokens, num_experts = scores.shape
    layout = rows.layout_of(num_experts)
    given = [scores] if ranking is None else [ranking, scores]
    dtypes = (jnp.int32, jnp.float32) if with_weights else (jnp.int32,)

    def body(*refs):
        given_refs, outs, (tiles, staging, copied) = _split(refs, len(given), len(dtypes))
        for ref, tile in zip(given_refs, tiles, strict=True):
            plgpu.copy_gmem_to_smem(ref, tile.at[:num_tokens], copied)
        plgpu.barrier_wait(copied)
        ranked, *weighed = [plgpu.load(tile, layout=layout, optimized=False) for tile in tiles]
        chosen = rounds(ranked, layout, functools.partial(spread, layout=layout), *weighed)
        weights = chosen.weights if chosen.total is None else [weight / chosen.total for weight in chosen.weights]
        for buffer, numbers in zip(staging, (chosen.ids, weights), strict=False):
            for i, number in enumerate(numbers):
                store(buffer.at[:, i], number)
        plgpu.commit_smem()
        for buffer, out in zip(staging, outs, strict=True):
            plgpu.copy_smem_to_gmem(buffer.at[:num_tokens], out)
        plgpu.wait_smem_to_gmem(0)

    in_block, columns = rows.of_block(num_experts), pl.cdiv(rounds.k, _VECTOR) * _VECTOR
    scratch = [
        [plgpu.SMEM((in_block, num_experts), jnp.float32) for _ in given],
        [plgpu.SMEM((in_block, columns), dtype) for dtype in dtypes],
        plgpu.Barrier(num_arrivals=len(given)),
    ]
    outs = [jax.ShapeDtypeStruct((num_tokens, columns), dtype) for dtype in dtypes]
    found = launch(body, outs, *given, name="top_k", blocks=1, scratch=scratch)
    return [x if columns == rounds.k else x[:, : rounds.k] for x in found]


def _split(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """`refs` as parts of these sizes, and the rest."""
    parts = []
    for size in sizes:
        parts.append(refs[:size])
        refs = refs[size:]
    return [*parts, refs]

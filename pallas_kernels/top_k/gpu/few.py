"""Rows fewer than a block of `rows` has: through shared memory, where those past the last are whatever lies there."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.strips import launch, spread, store
from pallas_kernels.top_k.gpu import rows
from pallas_kernels.top_k.gpu.groups import TILE, Memory, find_kept, limited
from pallas_kernels.top_k.gpu.rounds import Rounds
from pallas_kernels.top_k.groups import Groups

COPIED_BYTES = 128
"""In multiples of which the copy engine fills shared memory."""

_VECTOR = 4  # numbers of 4 bytes in 16, in multiples of which it empties it
_COLUMNS = 8  # of the smallest tile


def fits(scores: jax.Array) -> bool:
    """Whether the rows are such, and the copy engine can bring them."""
    num_tokens, num_experts = scores.shape
    is_few = rows.takes(num_experts) and 0 < num_tokens < rows.of_block(num_experts)
    return is_few and scores.nbytes % COPIED_BYTES == 0


def fits_groups(scores: jax.Array, groups: Groups) -> bool:
    """Whether all their groups are one tile at most, too."""
    (num_tokens, num_experts), num_groups = scores.shape, groups.num_groups
    is_tile = TILE % num_groups == 0 and num_experts // num_groups % _COLUMNS == 0
    return fits(scores) and is_tile and num_tokens * num_groups <= TILE


def choose(
    scores: jax.Array,
    rounds: Rounds,
    *,
    with_weights: bool,
    ranking: jax.Array | None = None,
    groups: Groups | None = None,
) -> list[jax.Array]:
    """Ids [T, K], and their weights [T, K] if wanted: scores where `ranking`, if given, is best within the groups."""
    num_tokens, num_experts = scores.shape
    layout = rows.layout_of(num_experts)
    by, in_block = scores if ranking is None else ranking, rows.of_block(num_experts)
    given = [by] if ranking is None else [by, scores]
    tile_rows = [in_block] * len(given)
    if groups is not None:
        given.append(by.reshape(-1, num_experts // groups.num_groups))
        tile_rows.append(TILE)
    dtypes = (jnp.int32, jnp.float32) if with_weights else (jnp.int32,)

    def body(*refs):
        *arrays, tiles, staging, copied, memory = refs
        given_refs, outs = arrays[: len(given)], arrays[len(given) :]
        for ref, tile in zip(given_refs, tiles, strict=True):
            plgpu.copy_gmem_to_smem(ref, tile.at[: ref.shape[0]], copied)
        plgpu.barrier_wait(copied)
        if groups is not None:
            *tiles, of_groups = tiles
            find_kept(plgpu.load(of_groups, layout=plgpu.Layout.WGMMA, optimized=False), groups, memory)
        ranked, *weighed = [plgpu.load(tile, layout=layout, optimized=False) for tile in tiles]
        if groups is not None:
            ranked = limited(ranked, groups, memory, layout)
        chosen = rounds(ranked, layout, functools.partial(spread, layout=layout), *weighed)
        weights = chosen.weights if chosen.total is None else [weight / chosen.total for weight in chosen.weights]
        for buffer, numbers in zip(staging, (chosen.ids, weights), strict=False):
            for i, number in enumerate(numbers):
                store(buffer.at[:, i], number)
        plgpu.commit_smem()
        for buffer, out in zip(staging, outs, strict=True):
            plgpu.copy_smem_to_gmem(buffer.at[:num_tokens], out)
        plgpu.wait_smem_to_gmem(0)

    columns = pl.cdiv(rounds.k, _VECTOR) * _VECTOR
    scratch = [
        [plgpu.SMEM((height, x.shape[1]), jnp.float32) for height, x in zip(tile_rows, given, strict=True)],
        [plgpu.SMEM((in_block, columns), dtype) for dtype in dtypes],
        plgpu.Barrier(num_arrivals=len(given)),
        None if groups is None else Memory.describe(),
    ]
    outs = [jax.ShapeDtypeStruct((num_tokens, columns), dtype) for dtype in dtypes]
    found = launch(body, outs, *given, name="top_k", blocks=1, scratch=scratch)
    return [x if columns == rounds.k else x[:, : rounds.k] for x in found]

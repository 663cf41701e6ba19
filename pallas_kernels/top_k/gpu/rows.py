"""Rows of a power of two scores, each in neighbouring threads of a warp: a block for a few of them.

A thread has 8 or 16 scores of one row, so that a round takes it few instructions, and as many blocks as can work at a
time share the tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.strips import in_blocks, launch, rows_in_blocks, spread, store
from pallas_kernels.top_k.gpu.groups import TILE, Memory, find_kept, limited
from pallas_kernels.top_k.gpu.rounds import Rounds
from pallas_kernels.top_k.groups import Groups

_LEAST_EXPERTS, _MOST_EXPERTS = 16, 256
_LEAST_ROWS = 8  # of a block, two for each warp


def fits(scores: jax.Array) -> bool:
    """Whether there are such rows, and as many as a block takes."""
    num_tokens, num_experts = scores.shape
    return takes(num_experts) and num_tokens >= of_block(num_experts)


def takes(num_experts: int) -> bool:
    """Whether rows have a power of two scores, and threads hold them."""
    return num_experts.bit_count() == 1 and _LEAST_EXPERTS <= num_experts <= _MOST_EXPERTS


def fits_groups(scores: jax.Array, groups: Groups) -> bool:
    """Whether a block takes rows with all of their groups, too."""
    num_tokens, num_experts = scores.shape
    if not fits(scores) or TILE % groups.num_groups:
        return False
    tokens = TILE // groups.num_groups
    return tokens % of_block(num_experts) == 0 and num_tokens >= tokens


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
    rows = of_block(num_experts) if groups is None else TILE // groups.num_groups
    layout = layout_of(num_experts)
    along = functools.partial(spread, layout=layout)
    by, of = (scores, None) if ranking is None else (ranking, scores)
    by_group = None if groups is None else by.reshape(-1, num_experts // groups.num_groups)

    def body(by, of, by_group, ids, *refs):
        # The last block starts early enough to end with the rows: what two blocks share they both find.
        first = jnp.minimum(lax.axis_index("block") * rows, num_tokens - rows)
        tokens = pl.ds(first, rows)
        ranked = plgpu.load(by.at[tokens], layout=layout, optimized=False)
        weighed = None if of is None else plgpu.load(of.at[tokens], layout=layout, optimized=False)
        if groups is not None:
            of_tokens = pl.ds(first * groups.num_groups, TILE)
            tile = plgpu.load(by_group.at[of_tokens], layout=plgpu.Layout.WGMMA, optimized=False)
            find_kept(tile, groups, refs[-1])
            ranked = limited(ranked, groups, refs[-1], layout)
        chosen = rounds(ranked, layout, along, weighed)
        for i, (place, weight) in enumerate(zip(chosen.ids, chosen.weights, strict=True)):
            store(ids.at[tokens, i], place)
            if with_weights:
                store(refs[0].at[tokens, i], weight if chosen.total is None else weight / chosen.total)

    outs = [jax.ShapeDtypeStruct((num_tokens, rounds.k), jnp.int32)]
    if with_weights:
        outs.append(jax.ShapeDtypeStruct((num_tokens, rounds.k), jnp.float32))
    scratch = [] if groups is None else [Memory.describe()]
    return launch(body, outs, by, of, by_group, name="top_k", blocks=pl.cdiv(num_tokens, rows), scratch=scratch)


def of_block(num_experts: int) -> int:
    """Rows of a block."""
    return max(_LEAST_ROWS, rows_in_blocks(num_experts))


def layout_of(num_experts: int) -> Any:
    """The layout of the rows of a block."""
    if rows_in_blocks(num_experts) >= _LEAST_ROWS:
        return in_blocks(num_experts)
    vector = num_experts * _LEAST_ROWS // 128
    tiling = plgpu.Tiling(((_LEAST_ROWS, num_experts), (_LEAST_ROWS // 4, num_experts), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

"""The best groups of each token, of which alone it chooses: as bits, one for each group.

A group is ranked by the sum of its best scores; it is kept if fewer than so many of the token's groups are better, or
as good and before it. 64 groups are looked at together, a few tokens with all of theirs:

    scores of 64 groups, a row each          -> what each is ranked by, along the rows of a tile
    that, along its rows and its columns     -> how many of the same token are better: whether it is kept
    whether they are kept, along its columns -> the bits of each token
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu import smem
from pallas_kernels.on_gpu.strips import spread
from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, WGMMA_ROWS, along_columns, along_rows, iota
from pallas_kernels.top_k.gpu.rounds import LOWEST, first_place
from pallas_kernels.top_k.groups import Groups

TILE = WGMMA_ROWS
"""Groups of all tokens of a block, which are compared with each other."""


class Memory(NamedTuple):
    """Shared memory of a block.

    Attributes:
      ranked_by: of 64 groups.
      kept: of 64 groups, 0 or 1.
      bits: of each token, in the first places.
    """

    ranked_by: Any
    kept: Any
    bits: Any

    @classmethod
    def describe(cls) -> "Memory":
        """The types to allocate."""
        return cls(plgpu.SMEM((TILE,), jnp.float32), smem.ints(TILE), smem.ints(TILE))


def find_kept(ranking: jax.Array, groups: Groups, memory: Memory) -> None:
    """Writes the bits of the tokens whose groups are the rows of `ranking` [64, experts of a group]."""
    memory.ranked_by[...] = _sum_of_best(ranking, groups.ranked_by)
    plgpu.commit_smem()
    mine = along_rows(plgpu.load(memory.ranked_by, layout=ROWS))
    other = along_columns(plgpu.load(memory.ranked_by, layout=COLUMNS))
    of_same_token = lax.div(iota(0), groups.num_groups) == lax.div(iota(1), groups.num_groups)
    is_better = (other > mine) | ((other == mine) & (iota(1) < iota(0)))
    better = jnp.sum((of_same_token & is_better).astype(jnp.int32), axis=1)
    memory.kept[...] = (better < groups.kept).astype(jnp.int32)
    plgpu.commit_smem()
    kept = along_columns(plgpu.load(memory.kept, layout=COLUMNS))
    bit = kept << lax.rem(iota(1), groups.num_groups)
    memory.bits[...] = jnp.sum(jnp.where(lax.div(iota(1), groups.num_groups) == iota(0), bit, 0), axis=1)
    plgpu.commit_smem()


def limited(ranked: jax.Array, groups: Groups, memory: Memory, layout: Any) -> jax.Array:
    """Rows [tokens, E] in this layout, with the lowest numbers where `find_kept` has not kept their groups."""
    num_tokens, num_experts = ranked.shape
    bits = plgpu.load(memory.bits.at[:num_tokens], layout=layout.reduce((1,)), optimized=False)
    expert = plgpu.broadcasted_iota(jnp.int32, ranked.shape, 1, layout=layout)
    group = lax.div(expert, num_experts // groups.num_groups)
    is_kept = (spread(bits, num_experts, layout) >> group) & 1 == 1
    return jnp.where(is_kept, jnp.maximum(ranked, LOWEST / 2), LOWEST)


def _sum_of_best(remaining: jax.Array, count: int) -> jax.Array:
    """The sum of the `count` largest numbers of each row."""
    column = plgpu.broadcasted_iota(jnp.int32, remaining.shape, 1, layout=plgpu.Layout.WGMMA)
    total = best = jnp.max(remaining, axis=1)
    for _ in range(1, min(count, remaining.shape[1])):
        _, is_taken = first_place(remaining, best, column, along_rows)
        remaining = jnp.where(is_taken, -jnp.inf, remaining)
        best = jnp.max(remaining, axis=1)
        total = total + best
    return total

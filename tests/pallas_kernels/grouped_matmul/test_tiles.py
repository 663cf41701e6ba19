"""The order in which a Hopper kernel's blocks visit the tiles of a product, as any array code can run it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul.gpu.tiles import Walk
from tests.pallas_kernels.grouped_matmul.test_sizes import SIZES, M

MOST_TILES = 200


@functools.partial(jax.jit, static_argnums=0)
def visited(walk: Walk, sizes: jax.Array, first: int, step: int) -> tuple[jax.Array, jax.Array]:
    """[MOST_TILES, 4]: group, row, rows and column of the tiles of a block; and how many they are."""

    def note(tile, carry):
        seen, count = carry
        return seen.at[count].set(jnp.stack([tile.group, tile.row, tile.rows, tile.column])), count + 1

    none = jnp.zeros((MOST_TILES, 4), jnp.int32), jnp.int32(0)
    return walk.for_each(sizes, first, step, note, none)


@pytest.mark.parametrize("strip", [1, 2, 4])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("sizes", "rows"), SIZES.values(), ids=list(SIZES))
@pytest.mark.quick(
    "all huge-3-4",
    "all negative-1-2",
    "fitting-1-2",
    "full-1-1",
    "huge after negative-3-1",
    "negative-3-4",
    "one huge-1-1",
    "past the end-3-4",
)
def test_every_row_is_in_one_tile_of_its_group(sizes, rows, blocks, strip):
    """Those that no group owns are the last group's, however many rows the sizes claim."""
    walk = Walk(len(sizes), M, 16, 3, strip)
    parts = []
    for block in range(blocks):
        seen, count = visited(walk, jnp.array(sizes, jnp.int32), block, blocks)
        assert count < MOST_TILES
        parts.append(np.asarray(seen[:count]))
    owner = np.full((M, walk.column_tiles), -1)
    for group, row, count, column in np.concatenate(parts):
        assert (owner[row : row + count, column] == -1).all()
        assert 0 < count <= walk.block_m
        owner[row : row + count, column] = group
    expected = np.repeat(np.arange(len(sizes) + 1), [*rows, M - sum(rows)])
    np.testing.assert_array_equal(owner, np.tile(expected[:, None], walk.column_tiles))

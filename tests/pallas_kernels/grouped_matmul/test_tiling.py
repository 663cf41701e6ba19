"""Which tiles the Hopper kernels are offered: those whose sums their registers hold."""

import dataclasses

import pytest

from pallas_kernels.chips import get_chip
from pallas_kernels.grouped_matmul.gpu.hopper import tiling
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Problem

H200 = get_chip("h200")
PROBLEM = Problem("bfloat16", False, False, False, num_groups=8, num_rows=384, depth=7168, columns=4096)

TILES = {
    *((64, block_n, 1) for block_n in (64, 128, 192, 256)),
    *((64, block_n, 2) for block_n in (128, 256)),
    *((128, block_n, 2) for block_n in (64, 128, 192, 256)),
}
"""(block_m, block_n, warpgroups): each warpgroup's columns come in whole instructions of 64."""

TOO_MANY_SUMS = {(64, 192, 1), (64, 256, 1), (128, 256, 2)}
"""With block scales a warpgroup holds its sums and a part that is not scaled yet: a register a column for each thread,
of which one warpgroup alone takes 128 at most, and two take 192."""


@pytest.mark.parametrize("block_scales", [False, True])
def test_tiles_with_block_scales_leave_registers_for_a_second_set_of_sums(block_scales):
    offered = tiling.candidates(H200, dataclasses.replace(PROBLEM, block_scales=block_scales))
    tiles = {(config.block_m, config.block_n, config.warpgroups) for config in offered}
    assert tiles == (TILES - TOO_MANY_SUMS if block_scales else TILES)


@pytest.mark.parametrize("tile", sorted(TILES))
def test_a_tile_from_a_table_is_held_to_the_same_limit(tile):
    block_m, block_n, warpgroups = tile
    config = tiling.Config(block_m, block_n, 2, warpgroups, 1)
    assert tiling.fits(H200, PROBLEM, config)
    in_blocks = dataclasses.replace(PROBLEM, block_scales=True)
    assert tiling.fits(H200, in_blocks, config) == (tile not in TOO_MANY_SUMS)


@pytest.mark.parametrize(("fused", "out_slots"), [(False, 4), (True, 2)])
def test_the_largest_tiles_of_16_bits_go_out_at_once(fused, out_slots):
    """A row of 256 columns has four parts of 128 bytes, and of gate and up together it has two."""
    problem = dataclasses.replace(PROBLEM, fused=fused)
    (largest,) = (c for c in tiling.candidates(H200, problem) if (c.block_m, c.block_n) == (128, 256))
    assert (largest.num_stages, largest.out_slots, largest.strip) == (3, out_slots, 4)


def test_copied_sizes_of_groups_take_their_place():
    few, many = (dataclasses.replace(PROBLEM, num_groups=number) for number in (16, 17))
    assert tiling._shared_memory(64, 128, 1, 2, many)[1] - tiling._shared_memory(64, 128, 1, 2, few)[1] == 4 * 256

"""Tiles of DS_TPU's attention against a search over all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.model.ds_tpu_attention import best_tile, evaluate_attention
from bench.model.shapes import AttentionShape
from pallas_kernels.chips import get_chip

LIMIT = int(0.45 * 2 * 2**20)


def shape_of(rows: int, keys: int, width: int, value_width: int, caches: int = 1) -> AttentionShape:
    return AttentionShape(
        caches, rows, keys, width, value_width, pairs=rows * keys, keys=caches * keys, query_width=rows * width
    )


def padded(number: int, step: int) -> int:
    return -(-number // step) * step


def needed(shape: AttentionShape, rows: int, keys: int, width: int) -> int:
    queries = rows * padded(shape.QD * width, 32)
    cache = keys * (padded(shape.QD * width, 32) + padded(shape.VD * width, 32))
    return queries + cache + 2 * rows * padded(2 * keys, 32) + 4 * rows * padded(2 * shape.VD, 32)


@given(
    shape=st.builds(shape_of, st.integers(1, 900), st.integers(1, 900), st.integers(1, 600), st.integers(1, 600)),
    width=st.sampled_from([1, 2]),
    limit=st.integers(200_000, LIMIT),
)
def test_the_tile_has_the_fewest_sweeps_and_the_most_keys(shape, width, limit):
    sizes = [
        (rows, keys)
        for rows in range(16, padded(shape.QS, 16) + 1, 16)
        for keys in range(16, padded(shape.KS, 16) + 1, 16)
        if needed(shape, rows, keys, width) <= limit
    ]
    tile = best_tile(shape, width, limit)
    assert (tile.Q, tile.K) in sizes
    fewest = min(-(-shape.QS // rows) for rows, _ in sizes)
    assert fewest == -(-shape.QS // tile.Q)
    assert max(keys for rows, keys in sizes if rows == tile.Q) == tile.K


def test_keys_are_read_again_for_every_tile_of_queries():
    chip = get_chip("v32-run")
    small, large = (evaluate_attention(chip, shape_of(rows, 4096, 128, 128), "bf16") for rows in (128, 8192))
    sweeps = -(-8192 // large.best_tile.Q)
    assert sweeps > 1
    assert large.dram_traffic == 2 * (8192 * 128 + 4096 * 256 * sweeps) + 2 * 8192 * 128
    assert small.dram_traffic == 2 * (128 * 128 + 4096 * 256) + 2 * 128 * 128


def test_the_core_with_the_most_caches_is_the_slowest():
    chip = get_chip("v32-run")
    one, full, more = (evaluate_attention(chip, shape_of(16, 256, 64, 64, caches), "fp8") for caches in (1, 64, 65))
    assert one.elapsed == full.elapsed == more.elapsed / 2
    assert (one.best_partition, full.best_partition, more.best_partition) == ((1,), (64,), (64,))


def test_every_extent_is_padded():
    """Rows to 16, keys to 8 for the scores, to 32 for the outputs and to 16 for the softmax, widths to 32 and 8."""
    core = 768e12 / 2 / 64  # multiply-adds a second
    time = evaluate_attention(get_chip("v32-run"), shape_of(17, 41, 33, 9), "bf16")
    rows = 32
    macs = rows * 64 * 48 + rows * 64 * 16
    softmax = rows * 48 * 37 + rows * 41
    assert time.comp_elapsed == pytest.approx((macs / core + softmax / 1024 / (core / 4096)) * 1e6)
    assert time.dram_occupy == 17 * 17 * 33 * 2


def test_no_tile_fits():
    with pytest.raises(ValueError, match="no tile of an attention 1,16,16,60000,64"):
        evaluate_attention(get_chip("v32-run"), shape_of(16, 16, 60000, 64), "bf16")

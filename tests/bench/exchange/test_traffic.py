"""Bytes of an exchange against numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest

from bench.exchange.traffic import Traffic, row_bytes, rows_between, traffic_of
from moejax import MoEConfig
from moejax.stages import way_of
from sharding.partition import Axes

IDS = np.array([[0], [1], [1], [1], [1], [0]], np.int32)  # the module's example
OUT, BACK = 7168 + 4 * 56, 2 * 7168  # FP8 values and a float32 scale of each 128; BF16


def layer(num_experts=2, **changes):
    return MoEConfig(
        hidden_size=7168, intermediate_size=128, num_experts=num_experts, top_k=1, precision="w8a8", **changes
    )


def way(config, ep, slab=None):
    axes = Axes(expert=("expert",), tokens=("expert",), sizes=(("expert", ep),))
    return dataclasses.replace(way_of(config, axes), slab=slab)


def test_rows_between_chips():
    assert rows_between(IDS, 2, 2).tolist() == [[1, 2], [1, 2]]
    two_choices = np.array([[0, 5], [3, 4], [2, 7], [6, 7]])
    assert rows_between(two_choices, 8, 2).tolist() == [[2, 2], [1, 3]]


def test_bytes_of_a_row():
    config = layer()
    assert row_bytes(config, way(config, 2)) == (OUT, BACK)
    assert row_bytes(config, way(config, 2), 512) == (7168 + 512, BACK)
    config = dataclasses.replace(config, precision="w16a16")
    assert row_bytes(config, way(config, 2)) == (BACK, BACK)


@pytest.mark.parametrize(
    ("name", "platform", "rows", "back", "out"),
    [
        ("dense", "gpu", 2 * 2, 2 * 2, OUT),
        ("ragged", "gpu", 3, 3, OUT),
        ("lax.ragged_all_to_all", "tpu", 3, 3, OUT),
        ("remote", "tpu", 3, 3, 7168 + 512),
        ("remote", "gpu", 3, 3, OUT),
        ("ragged", "cpu", 2 * 3, 2 * 2 * 2, OUT),  # all rows to everyone, and all that there is room for
    ],
)
def test_what_is_needed_and_what_is_sent(name, platform, rows, back, out):
    config = layer()
    traffic = traffic_of(name, config, way(config, 2, slab=2), IDS, platform)
    assert traffic.needed == (3 * OUT, 3 * BACK)
    assert traffic.busiest == (2 * OUT, 2 * BACK)
    assert traffic.wire == (rows * out, back * BACK)


def test_a_bare_all_to_all_has_a_balanced_load():
    config = layer(4)
    ids = np.zeros((4 * 6, 1), np.int32)  # all to chip 0, of four: 6 rows of each for it
    traffic = traffic_of("lax.all_to_all", config, way(config, 4, slab=6), ids, "gpu")
    assert traffic == Traffic((24 * OUT, 24 * BACK), (6 * OUT, 6 * BACK), (24 * OUT, 24 * BACK))
    traffic = traffic_of("dense", config, way(config, 4, slab=6), ids, "gpu")
    assert traffic == Traffic((18 * OUT, 18 * BACK), (18 * OUT, 18 * BACK), (72 * OUT, 72 * BACK))


def test_of_a_transport_that_is_not_known_only_the_need_is():
    config = layer()
    assert traffic_of("post", config, way(config, 2, slab=2), IDS, "gpu").wire is None

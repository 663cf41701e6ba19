"""Plans of replicas: how evenly ranks are loaded, and what every plan has to hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.balance import balance, rank_loads


def unevenness(load: np.ndarray, experts: np.ndarray, ep: int) -> float:
    """The busiest rank over the mean."""
    loads = rank_loads(load, experts, ep)
    return loads.max() / loads.mean()


@given(
    load=st.lists(st.floats(0, 1e6), min_size=1, max_size=24),
    ep=st.integers(1, 6),
    spare=st.integers(0, 12),
)
def test_every_plan_is_one(load, ep, spare):
    """Every expert has a slot, no rank has one twice, and a plan moves no rank above what one slot each would do."""
    num_slots = -(-(len(load) + spare) // ep) * ep
    if num_slots > len(load) * ep:
        return
    experts = balance(np.array(load), num_slots, ep)
    assert experts.dtype == np.int32
    assert experts.shape == (num_slots,)
    assert set(experts.tolist()) == set(range(len(load)))
    for rank in experts.reshape(ep, -1):
        assert len(set(rank.tolist())) == rank.size
    assert rank_loads(load, experts, ep).sum() == pytest.approx(sum(load))
    np.testing.assert_array_equal(balance(np.array(load), num_slots, ep), experts)


@pytest.mark.parametrize(
    ("exponent", "limit"), [(0.0, 1.001), (0.5, 1.01), (1.0, 1.01), (1.5, 1.19)], ids=["even", "0.5", "1.0", "1.5"]
)
def test_zipf_loads_over_32_ranks(exponent, limit, rng):
    """Of Zipf's law with 1.5 the 32 spare slots cannot split all hot experts as far as that would take."""
    load = rng.permutation(np.arange(1.0, 257.0) ** -exponent)
    assert unevenness(load, balance(load, 288, 32), 32) < limit
    assert unevenness(load, np.arange(256), 32) >= 1


def test_replicas_go_to_the_hottest():
    experts = balance(np.array([8.0, 1.0, 1.0, 2.0]), num_slots=6, ep=3)
    assert np.bincount(experts).tolist() == [3, 1, 1, 1]
    loads = sorted(rank_loads(np.array([8.0, 1.0, 1.0, 2.0]), experts, 3))
    assert loads == pytest.approx([11 / 3, 11 / 3, 14 / 3])


def test_groups_and_replicas_stay_on_their_node(rng):
    load = rng.exponential(size=64)
    experts = balance(load, 80, ep=8, num_nodes=2, num_groups=8).reshape(2, -1)
    first, second = (set(node.tolist()) for node in experts)
    assert not first & second
    assert all(len({expert in first for expert in range(8 * group, 8 * group + 8)}) == 1 for group in range(8))
    assert unevenness(load, experts.reshape(-1), 8) < unevenness(load, np.arange(64), 8)


def test_without_spare_slots_experts_are_shuffled(rng):
    load = rng.uniform(0.5, 1.5, size=32)  # none so hot that it fills a rank by itself
    experts = balance(load, 32, ep=4)
    assert sorted(experts.tolist()) == list(range(32))
    assert unevenness(load, experts, 4) < 1.02


def test_experts_without_a_slot_have_no_rank():
    with pytest.raises(ValueError, match="multiple of ep=2 slots with each of 3 experts, got 4 slots of 2"):
        rank_loads(np.ones(3), np.array([0, 1, 0, 0]), 2)


def test_no_load_at_all():
    assert set(balance(np.zeros(8), 12, ep=4).tolist()) == set(range(8))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([[1.0]], 1, 1), {}, r"load must be \[E\], rows of every expert, got \[1, 1\]"),
        (([1.0, np.nan], 2, 1), {}, "load must be finite and not negative"),
        (([1.0, -1.0], 2, 1), {}, "load must be finite and not negative, got -1.0 to 1.0"),
        (([1.0] * 4, 3, 1), {}, "num_slots must be at least the 4 experts, got 3"),
        (([1.0] * 4, 6, 4), {}, "num_slots must be a multiple of ep, got 6 and 4"),
        (([1.0] * 4, 12, 2), {}, "num_slots must be at most 8, each of the 4 experts once on each of the 2 ranks"),
        (([1.0] * 4, 4, 0), {}, "ep must be a whole number of at least 1, got 0"),
        (([1.0] * 4, 8.0, 4), {}, "num_slots must be a whole number of at least 1, got 8.0"),
        (({"a": 1}, 4, 4), {}, "load must be numbers .*, such as aux.load.tokens_per_expert, got ndarray"),
        (([1.0] * 4, 8, 4), {"num_nodes": 3}, "ep must be a multiple of num_nodes, got 4 and 3"),
        (([1.0] * 4, 8, 4), {"num_groups": 3}, "num_groups must divide the experts, got 4 and 3"),
        (([1.0] * 4, 8, 4), {"num_nodes": 2, "num_groups": 1}, "num_groups must be a multiple of num_nodes"),
    ],
)
def test_bad_arguments(arguments, settings, message):
    load, *rest = arguments
    with pytest.raises(ValueError, match=message):
        balance(np.array(load), *rest, **settings)

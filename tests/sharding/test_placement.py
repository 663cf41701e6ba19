"""Which chip holds which expert."""

import numpy as np
import pytest

from sharding.placement import Placement


@pytest.mark.parametrize(("num_experts", "ep", "local"), [(8, 1, 8), (8, 8, 1), (256, 32, 8), (384, 32, 12)])
def test_every_rank_holds_as_many(num_experts, ep, local):
    placement = Placement(num_experts, ep)
    assert placement.num_local == local
    experts = np.arange(num_experts)
    np.testing.assert_array_equal(placement.rank(experts) * local + placement.slot(experts), experts)
    assert np.bincount(placement.rank(experts)).tolist() == [local] * ep
    assert placement.rank(np.array([-1])).tolist() == [-1]


@pytest.mark.parametrize(
    ("num_experts", "ep", "message"),
    [
        (8, 32, "num_experts=8 is not divisible by ep=32; choose ep among 1, 2, 4, 8$"),
        (12, 8, "num_experts=12 is not divisible by ep=8; choose ep among 1, 2, 3, 4, 6, 12$"),
        (8, 0, "ep must be at least 1, got 0"),
    ],
)
def test_ep_that_does_not_divide_the_experts(num_experts, ep, message):
    with pytest.raises(ValueError, match=message):
        Placement(num_experts, ep)

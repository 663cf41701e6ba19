"""Rows between nodes and within them: against the plans of exchanges over virtual chips, and what chance says."""

import dataclasses

import jax
import numpy as np
import pytest

from bench.model.hops import Nodes, direct, in_two_hops, uniform_ids
from tests.sharding.exchange.exchanges import Problem, over_chips, random_ids

PROBLEM = Problem(dp=1, ep=8, num_tokens=12, top_k=3, num_experts=16, transport="hierarchical", nodes=4, slab=144)
NODES = Nodes(count=4, chips=2, num_experts=16)


def planned(problem: Problem, ids):
    """Of the plan of each chip: rows for each node and for each chip of the node."""

    def on_chip(ids):
        plan = problem.carrier.plan_rows(ids, problem.way)
        if problem.transport == "dense":
            return plan.departure.group_sizes
        return plan.across.departure.group_sizes, plan.within.departure.group_sizes

    return jax.tree.map(np.asarray, over_chips(problem, on_chip)(ids))


def test_counts_are_those_of_the_plans(rng):
    ids = random_ids(PROBLEM, rng)
    chip = np.arange(8)
    node = chip // 2
    to_nodes, to_chips = planned(PROBLEM, ids)
    traffic = in_two_hops(ids, NODES)
    for n in range(4):
        others = node != n
        place = 2 * n + chip % 2
        assert traffic.across.rows[chip, place][others].tolist() == to_nodes[others, n].tolist()
    assert traffic.across.rows_sent.sum() == to_nodes.sum() - to_nodes[chip, node].sum()
    for local in range(2):
        others = chip % 2 != local
        assert traffic.within.rows[chip, 2 * node + local][others].tolist() == to_chips[others, local].tolist()
    assert traffic.within.rows_sent.sum() == to_chips.sum() - to_chips[chip, chip % 2].sum()

    plain = planned(dataclasses.replace(PROBLEM, transport="dense"), ids) * ~np.eye(8, dtype=bool)
    traffic = direct(ids, NODES)
    np.testing.assert_array_equal(traffic.across.rows + traffic.within.rows, plain)
    assert traffic.across.rows_sent.tolist() == [plain[c, node != node[c]].sum() for c in chip]
    assert traffic.across.messages.tolist() == [(plain[c, node != node[c]] > 0).sum() for c in chip]


@pytest.mark.parametrize(("count", "groups", "kept"), [(4, 1, 1), (32, 1, 1), (4, 8, 4), (8, 8, 4)])
def test_uniform_choices_take_the_nodes_that_chance_says(count, groups, kept):
    """Of 256 experts a token takes 8: Σ over nodes of 1 − C(256 − n, 8) / C(256, 8), its own node not counted."""
    nodes = Nodes(count, 8, 256)
    ids = uniform_ids(256 * count, 256, 8, seed=1, groups=groups, kept=kept)
    assert all(len(set(row)) == 8 for row in ids[:64].tolist())
    if groups == 1:
        size = 256 // count
        missed = np.prod([(256 - size - i) / (256 - i) for i in range(8)])
        expected, tolerance = (count - 1) * (1 - missed), 0.02
        assert in_two_hops(ids, nodes).across.rows_sent.sum() / len(ids) == pytest.approx(expected, rel=tolerance)
    else:
        assert max(len(set(row // (256 // groups))) for row in ids) == kept
        assert in_two_hops(ids, nodes).across.rows_sent.sum() <= len(ids) * min(kept, count)
    assert direct(ids, nodes).across.rows_sent.sum() / len(ids) == pytest.approx(8 * (count - 1) / count, rel=0.02)


def test_elapsed_is_that_of_the_busiest_links():
    """Two nodes of one chip: of chip 0, two tokens with both experts of chip 1, which chooses its own."""
    nodes = Nodes(count=2, chips=1, num_experts=4)
    ids = np.array([[2, 3], [2, 3], [2, 3], [3, 2]])
    units = {"out": 100, "back": 200, "across": 1e6, "within": 1e9}
    assert direct(ids, nodes).elapsed(**units) == pytest.approx(4 * 300)
    assert in_two_hops(ids, nodes).elapsed(**units) == pytest.approx(2 * (300 + 16))


def test_the_busiest_chip_may_be_one_that_sends_or_one_that_gets():
    """Three nodes of one chip with a token each, K = 1: all to chip 0; and all choices of chip 0 to the others."""
    nodes = Nodes(count=3, chips=1, num_experts=3)
    assert direct(np.array([[0], [0], [0]]), nodes).across.busiest == 2
    assert direct(np.array([[1, 2], [1, 1], [2, 2]]), nodes).across.busiest == 2


def test_sizes_that_do_not_divide():
    for num_experts, tokens in ((10, 8), (16, 9)):
        with pytest.raises(ValueError, match=rf"8 chips must divide {tokens} tokens and num_experts={num_experts}"):
            direct(np.zeros((tokens, 2), int), Nodes(4, 2, num_experts))

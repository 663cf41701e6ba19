"""What only an exchange in two hops can get wrong: how often a token enters a node, rounds of both exchanges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pallas_kernels.quantize import dequantize, quantize
from sharding.exchange import Wire, exchange, pick, pick_transport
from sharding.exchange.dense import Dense
from sharding.exchange.exact import Exact
from sharding.exchange.hierarchical import Hierarchical, chosen_nodes
from sharding.exchange.way import Way
from sharding.partition import Axes, expert_axes
from sharding.placement import Placement
from tests.helpers import LIMIT, normal, relative_error, same_bits
from tests.sharding.exchange.exchanges import (
    Problem,
    apply_experts,
    expected_sum,
    inputs,
    over_chips,
    random_ids,
    scale_by_expert,
)

BY_2 = Problem(dp=1, ep=8, num_tokens=12, top_k=3, num_experts=16, transport="hierarchical", nodes=2)
BY_4 = dataclasses.replace(BY_2, nodes=4)
IN_ROUNDS = dataclasses.replace(BY_4, slab=4)
PROBLEMS = [BY_2, BY_4, IN_ROUNDS]


def check(problem: Problem, ids, rng) -> None:
    args = inputs(problem, rng, ids)
    y, _ = apply_experts(problem)(*args)
    np.testing.assert_array_equal(y, expected_sum(*args))


def test_problems_take_one_round_and_several():
    """Of the outer exchange, and of the inner one, as far as their buffers tell."""

    def rounds(problem):
        hops = problem.carrier.hops((problem.num_tokens, problem.top_k), problem.way)
        across = -(-problem.num_tokens // (hops.rows // problem.nodes))
        return across, -(-hops.rows * problem.top_k // hops.within.slab)

    assert [rounds(problem) for problem in PROBLEMS] == [(1, 3), (1, 4), (3, 12)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["2x4", "4x2", "rounds"])
@pytest.mark.quick("rounds")
def test_every_kind_of_load(problem, rng):
    """Each expert alone, one token, none; nodes without tokens; even and uneven."""
    shape = problem.all_tokens, problem.top_k
    for expert in (0, 7, problem.num_experts - 1):
        check(problem, np.full(shape, expert, np.int32), rng)
    for token in (0, problem.all_tokens - 1):
        ids = np.full(shape, -1, np.int32)
        check(problem, ids, rng)
        ids[token] = [problem.num_experts - 1, 0, 5]
        check(problem, ids, rng)
    for used, silent in (([0, 1, 2, 3], ()), ([3, 12], (0, 1, 2, 3)), (None, (7,)), (None, ())):
        check(problem, random_ids(problem, rng, used, silent), rng)
    check(problem, (np.arange(np.prod(shape), dtype=np.int32) % problem.num_experts).reshape(shape), rng)


@functools.cache
def crossings(problem: Problem):
    """ids -> of each chip: the plan of what leaves for each node, the rows that come, their choices; and the nodes.

    The problem's slabs have to hold everything.
    """

    def on_chip(ids):
        plan = problem.carrier.plan_rows(ids, problem.way)
        hops = problem.carrier.hops(ids.shape, problem.way)
        came = plan.within.departure.group_sizes.sum()
        return plan.across.departure, plan.across.group_sizes, came, chosen_nodes(ids, problem.num_experts, hops)

    return over_chips(problem, on_chip)


@pytest.mark.parametrize("problem", [dataclasses.replace(by, slab=144) for by in (BY_2, BY_4)], ids=["2x4", "4x2"])
@given(data=st.data())
@pytest.mark.quick("4x2")
def test_a_token_enters_a_node_once(data, problem):
    """The plan has as many rows for a node as there are tokens that chose it, and their choices arrive there."""
    shape = problem.all_tokens, problem.top_k
    ids = data.draw(arrays(np.int32, shape, elements=st.integers(-1, problem.num_experts - 1)))
    departure, came, choices, nodes = jax.tree.map(np.asarray, crossings(problem)(ids))
    node_of = np.where(ids >= 0, ids * problem.nodes // problem.num_experts, -1)
    wanted = [sorted(set(row) - {-1}) for row in node_of.tolist()]
    assert [[n for n in row if n >= 0] for row in nodes.reshape(len(ids), -1).tolist()] == wanted

    chips = problem.ep
    left = (departure.inverse >= 0).reshape(len(ids), -1).sum(1)
    assert left.tolist() == [len(row) for row in wanted]
    in_chip = np.array_split(np.arange(len(ids)), chips)
    for chip in range(chips):
        counts = np.bincount([n for t in in_chip[chip] for n in wanted[t]], minlength=problem.nodes)
        assert departure.group_sizes[chip].tolist() == counts.tolist()
        node, local = divmod(chip, chips // problem.nodes)
        peers = np.concatenate([in_chip[n * (chips // problem.nodes) + local] for n in range(problem.nodes)])
        assert came[chip].sum() == sum(node in wanted[t] for t in peers)
        assert choices[chip] == (node_of[peers] == node).sum()


@pytest.mark.slow
def test_gradients_equal_those_of_the_plain_sum_in_rounds_of_both(rng):
    _check_gradients(IN_ROUNDS, rng)


def _check_gradients(problem: Problem, rng) -> None:
    ids = random_ids(problem, rng, used=[0, 1, 9, 10])
    x, weights, factors = abs(normal(rng, problem.all_tokens, 8)), abs(normal(rng, *ids.shape)), jnp.arange(1.0, 17)
    direction = abs(normal(rng, *x.shape))

    def loss(x, weights, factors):
        return (apply_experts(problem)(x, weights, ids, factors)[0] * direction).sum()

    def plain(x, weights, factors):
        return (x * jnp.where(ids >= 0, weights * factors[ids], 0).sum(1)[:, None] * direction).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, factors)
    expected = jax.grad(plain, argnums=(0, 1, 2))(x, weights, factors)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < LIMIT["float32"]


@pytest.mark.slow
def test_bits_do_not_tell_how_many_rounds_there_were(rng):
    """They tell how many nodes there are: each adds its own terms first."""
    ids = random_ids(BY_4, rng)
    x, weights, factors = normal(rng, BY_4.all_tokens, 8), normal(rng, *ids.shape), normal(rng, 16)
    one, other = (apply_experts(problem)(x, weights, ids, factors)[0] for problem in (BY_4, IN_ROUNDS))
    assert same_bits(one, other)


def test_rows_are_rounded_before_the_first_hop_only(rng):
    """Rounding again would leave rows in BF16 as they are, but cost a pass; in float32 it shows in the last bits."""
    problem = Problem(1, 4, 6, 1, 4, hidden=256, wire=Wire(), transport="hierarchical")
    x, ids = normal(rng, problem.all_tokens, 256), np.arange(24, dtype=np.int32)[:, None] % 4

    def rounded(x):
        return dequantize(quantize(x, scaling="1x128"), x.dtype)

    in_16_bits = x.astype(jnp.bfloat16)
    assert same_bits(rounded(rounded(in_16_bits)), rounded(in_16_bits))

    assert not same_bits(rounded(rounded(x)), rounded(x))
    y, _ = apply_experts(problem)(x, jnp.ones(ids.shape), ids, jnp.ones(4))
    np.testing.assert_array_equal(y, rounded(x))


@pytest.mark.slow
def test_few_of_many_choices(rng):
    """Where `max_choices` says how few are made, buffers are small, and hold those of one chip all the same."""
    ids = np.full((BY_4.all_tokens, BY_4.top_k), -1, np.int32)
    ids[:7] = rng.integers(0, BY_4.num_experts, (7, BY_4.top_k))
    args = inputs(BY_4, rng, ids)
    way = dataclasses.replace(BY_4.way, max_choices=7 * BY_4.top_k)
    assert pick_transport(way).rows_held(12, 3, way) < BY_4.rows_held

    def on_chip(x, weights, ids, factors):
        return exchange(x, weights, ids, scale_by_expert, factors, way)

    y = over_chips(BY_4, on_chip, num_by_expert=1)(*args)
    np.testing.assert_array_equal(np.asarray(y).reshape(args[0].shape), expected_sum(*args))


@pytest.mark.parametrize("outer", [Dense(), Exact("xla")], ids=["dense", "exact"])
@pytest.mark.parametrize("inner", [Dense(), Exact("xla")], ids=["dense", "exact"])
@pytest.mark.slow
def test_of_any_two_transports(outer, inner, rng, monkeypatch):
    monkeypatch.setitem(pick.TRANSPORTS, "hierarchical", Hierarchical(outer, inner))
    apply_experts.cache_clear()
    _check_gradients(BY_4, rng)
    check(BY_4, random_ids(BY_4, rng), rng)
    apply_experts.cache_clear()


def way_over(**sizes: int) -> Way:
    axes = tuple(sizes)
    ep = int(np.prod(list(sizes.values())))
    return Way(Placement(16, ep), Axes(expert=axes, tokens=axes, sizes=tuple(sizes.items())), transport="hierarchical")


def test_a_single_axis_is_refused():
    way = dataclasses.replace(way_over(expert=8), axes=expert_axes(8))
    with pytest.raises(ValueError, match=r"needs two axes for the experts.*\('expert',\) alone.*\('node', 'local'\)"):
        pick_transport(way).rows_held(4, 2, way)


def test_on_one_node_rows_travel_within_it():
    assert pick_transport(way_over(node=1, local=4)) is pick.TRANSPORTS["hierarchical"].inner
    assert pick_transport(way_over(node=4, local=1)) is pick.TRANSPORTS["hierarchical"]


def test_buffers_are_for_the_rows_that_there_can_be():
    """For 256 tokens with 8 choices on each chip: all that 4 nodes have; within, twice the 2048 of an even load."""
    way = way_over(node=4, local=4)
    hops = pick_transport(way).hops((256, 8), way)
    assert (hops.slots, hops.rows, hops.within.slab) == (4, 4 * 256, 2 * 2048 // 4)
    few = dataclasses.replace(way, max_rows=10)
    hops = pick_transport(few).hops((256, 8), few)
    assert (hops.across.max_rows, hops.rows, hops.within.max_rows) == (4 * 10, 4 * 40, 4 * 10)
    assert hops.within.slab == 1 * 40


def test_buffers_are_for_the_rows_of_all_chips_that_share_the_width():
    sizes = {"node": 2, "local": 2, "tensor": 2}
    axes = Axes(expert=("node", "local"), mlp=("tensor",), tokens=tuple(sizes), sizes=tuple(sizes.items()))
    way = dataclasses.replace(way_over(node=2, local=2), axes=axes)
    hops = pick_transport(way).hops((4, 2), way)
    assert (hops.rows, hops.within.slab) == (2 * 4, 2 * 8 * 2)

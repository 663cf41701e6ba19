"""The whole body on a chip against numpy: plan, rows out, experts, rows back, weighted sum, drops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.all_to_all import Blocks, Routes
from pallas_kernels.quantize import QTensor, dequantize, quantize
from sharding.exchange import Way, Wire, exchange, one_chip, pick_transport
from sharding.exchange.between_chips import result_dtype
from sharding.partition import Axes
from sharding.placement import Placement
from tests.helpers import LIMIT, normal, relative_error, same_bits
from tests.sharding.exchange.exchanges import (
    CARRIERS,
    IN_ROUNDS,
    ON_ONE_AXIS,
    Problem,
    apply_experts,
    expected_sum,
    inputs,
    over_chips,
    random_ids,
    scale_by_expert,
)

EP2 = Problem(dp=1, ep=2, num_tokens=7, top_k=2, num_experts=4)
EP8 = Problem(dp=1, ep=8, num_tokens=24, top_k=2, num_experts=8)
DP2_EP4 = Problem(dp=2, ep=4, num_tokens=9, top_k=3, num_experts=8)
DP2_EP8 = dataclasses.replace(EP8, dp=2)
ONE_CHIP = Problem(dp=1, ep=1, num_tokens=24, top_k=2, num_experts=4)
EVERY_TRANSPORT = [dataclasses.replace(DP2_EP4, transport=name) for name in CARRIERS]
every_problem = pytest.mark.parametrize("problem", [EP2, EP8, ONE_CHIP, *EVERY_TRANSPORT], ids=str)
pytestmark = pytest.mark.usefixtures("own_transports")


def test_a_choice_beyond_full_slabs_takes_one_more_round():
    """Of the first chip, one choice more goes to the first rank than fits into one slab, two, …"""
    slab, rounds = EP8.slab_and_rounds
    for full in range(1, rounds):
        x, weights, ids, factors = inputs(EP8, np.random.default_rng(full), used=())
        ids.reshape(-1)[: full * slab + 1] = 0
        weights = np.where(ids < 0, weights, 1)
        y, _ = apply_experts(EP8)(x, weights, ids, factors)
        np.testing.assert_array_equal(y, expected_sum(x, weights, ids, factors))


@every_problem
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@pytest.mark.quick("dp1-*-T24", "dp2-ep4-T9-ragged", "dp2-ep4-T9-routed", "dp2-ep4-T9-hier*")
def test_values_equal_numpy(seed, data, problem):
    used = data.draw(st.none() | st.lists(st.integers(0, problem.num_experts - 1), max_size=3))
    args = inputs(problem, np.random.default_rng(seed), used=used)
    y, dropped = apply_experts(problem)(*args)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected_sum(*args))
    assert not dropped.any()


@pytest.mark.parametrize("problem", [EP8, ONE_CHIP, *EVERY_TRANSPORT], ids=str)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
@given(seed=st.integers(0, 2**32 - 1), used=st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=2))
@pytest.mark.quick("0.5-dp2-ep4-T9-ragged", "1.5-dp1-ep8-T24", "1.0-dp1-ep1-T24")
def test_capacity_drops_and_counts(seed, used, factor, problem):
    """Chip by chip: an expert takes ⌈factor · T·K / E⌉ rows, first choices first; the rest adds nothing."""
    problem = dataclasses.replace(problem, capacity_factor=factor, capacity_of="chip")
    x, weights, ids, factors = inputs(problem, np.random.default_rng(seed), used=used)
    y, dropped = apply_experts(problem)(x, weights, ids, factors)

    capacity = int(np.ceil(factor * problem.num_tokens * problem.top_k / problem.num_experts))
    kept, lost = ids.copy(), np.zeros((problem.dp * problem.ep, problem.num_experts), int)
    for chip in range(len(lost)):
        begin = chip * problem.num_tokens
        taken = np.zeros(problem.num_experts, int)
        for k in range(problem.top_k):
            for token in range(begin, begin + problem.num_tokens):
                expert = ids[token, k]
                if expert >= 0 and taken[expert] == capacity:
                    kept[token, k] = -1
                    lost[chip, expert] += 1
                elif expert >= 0:
                    taken[expert] += 1
    np.testing.assert_array_equal(dropped, lost)
    np.testing.assert_array_equal(y, expected_sum(x, weights, kept, factors))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
@given(seed=st.integers(0, 2**32 - 1), used=st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=2))
@pytest.mark.slow
def test_a_capacity_of_the_batch_drops_alike_on_any_number_of_chips(seed, used, factor):
    """144 tokens on one chip, on eight, and on twice four: the same sum, the same drops."""
    problems = [Problem(dp, ep, 144 // dp // ep, 2, 8, capacity_factor=factor) for dp, ep in ((1, 1), (1, 8), (2, 4))]
    args = inputs(problems[0], np.random.default_rng(seed), used=used)
    (y, dropped), *others = [apply_experts(problem)(*args) for problem in problems]
    capacity = int(np.ceil(factor * 144 * 2 / 8))
    chosen = np.bincount(args[2][args[2] >= 0], minlength=8)
    np.testing.assert_array_equal(dropped.sum(0), np.maximum(chosen - capacity, 0))
    for other_y, other_dropped in others:
        np.testing.assert_array_equal(other_y, y)
        np.testing.assert_array_equal(other_dropped.sum(0), dropped.sum(0))


def test_repeated_experts_within_a_token_are_not_lost():
    """A router picks distinct experts; whoever does not gets the expert as often as asked for."""
    ids = np.repeat(np.arange(EP8.all_tokens, dtype=np.int32)[:, None] % 3, 2, axis=1)
    x, weights, _, factors = inputs(EP8, np.random.default_rng(0))
    weights = np.where(np.isnan(weights), 1, weights)
    y, dropped = apply_experts(EP8)(x, weights, ids, factors)
    np.testing.assert_array_equal(y, expected_sum(x, weights, ids, factors))
    assert not dropped.any()
    capped = dataclasses.replace(EP8, capacity_factor=1.0, capacity_of="chip")
    _, dropped = apply_experts(capped)(x, weights, ids, factors)
    # An expert takes 6 of the 16 assignments that each chip has for it.
    assert dropped.tolist() == [[10, 10, 10, 0, 0, 0, 0, 0]] * 8


@every_problem
@pytest.mark.quick("dp2-ep4-T9-dense", "dp2-ep4-T9-routed", "dp2-ep4-T9-hier*")
def test_gradients_equal_those_of_the_plain_sum(problem, rng):
    """For x, the weights and the experts' parameters, through as many rounds as the load takes."""
    _, _, ids, factors = inputs(problem, rng, used=[0, 1])
    # Positive, so that no sum cancels out and leaves rounding only.
    x = abs(normal(rng, problem.all_tokens, problem.hidden))
    weights, direction = abs(normal(rng, *ids.shape)), abs(normal(rng, *x.shape))

    def loss(x, weights, factors):
        return (apply_experts(problem)(x, weights, ids, factors)[0] * direction).sum()

    def plain(x, weights, factors):
        total = jnp.where(ids >= 0, weights * factors[ids], 0).sum(1)
        return (x * total[:, None] * direction).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, jnp.asarray(factors))
    expected = jax.grad(plain, argnums=(0, 1, 2))(x, weights, jnp.asarray(factors))
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < LIMIT["float32"]


@pytest.mark.parametrize("transport", IN_ROUNDS)
@pytest.mark.slow
def test_gradients_of_several_at_once(transport, rng):
    """Under `jax.vmap`, in one round and in several."""
    problem = dataclasses.replace(EP8, transport=transport)
    ids = np.stack([random_ids(problem, rng, used=used) for used in (None, [0])])
    weights, factors = np.ones(ids.shape, np.float32), np.arange(1, 9, dtype=np.float32)
    x = normal(rng, 2, problem.all_tokens, problem.hidden)

    def loss(x, weights, ids):
        return jnp.square(apply_experts(problem)(x, weights, ids, factors)[0]).sum()

    at_once = jax.jit(jax.grad(lambda x: jax.vmap(loss)(x, weights, ids).sum()))(x)
    for each, *args in zip(at_once, x, weights, ids, strict=True):
        assert relative_error(each, jax.jit(jax.grad(loss))(*args)) < LIMIT["float32"]


@pytest.mark.parametrize("problem", [EP8, *EVERY_TRANSPORT], ids=str)
@pytest.mark.quick("dp2-ep4-T9-routed")
def test_rows_that_travel_in_fp8_are_rounded_once(problem, rng):
    problem = dataclasses.replace(problem, hidden=128, wire=Wire())
    _, weights, ids, factors = inputs(problem, rng)
    x = normal(rng, problem.all_tokens, 128)
    y, _ = apply_experts(problem)(x, weights, ids, factors)
    rounded = jax.jit(lambda x: dequantize(quantize(x, scaling="1x128")))(x)
    assert relative_error(y, expected_sum(np.asarray(rounded), weights, ids, factors)) < LIMIT["float32"]


def test_rows_of_the_mesh_that_need_different_numbers_of_rounds(rng):
    """Balanced tokens in the first row, all to one expert in the second."""
    x, weights, ids, factors = inputs(DP2_EP8, rng)
    half = DP2_EP8.all_tokens // 2
    ids = np.where(ids < 0, 0, ids)
    ids[:half] = np.arange(2 * half).reshape(half, 2) % 8
    ids[half:] = 5
    weights = np.where(np.isnan(weights), 1, weights)
    y, _ = apply_experts(DP2_EP8)(x, weights, ids, factors)
    np.testing.assert_array_equal(y, expected_sum(x, weights, ids, factors))


@pytest.mark.parametrize("used", [None, [5], [2, 3]], ids=["all", "one", "two"])
@pytest.mark.slow
def test_bits_do_not_tell_how_many_rounds_there_were(used, rng):
    """Each token's choices are added in their order on every mesh, whichever travels first."""
    problems = [Problem(dp, ep, 144 // dp // ep, 5, 8) for dp, ep in ((1, 1), (1, 2), (1, 8), (2, 4))]
    assert [problem.slab_and_rounds[1] for problem in problems[1:]] == [1, 4, 1]
    problems += [dataclasses.replace(problems[-1], transport=name) for name in ON_ONE_AXIS]
    _, _, ids, _ = inputs(problems[0], rng, used=used)
    x, weights, factors = normal(rng, 144, problems[0].hidden), normal(rng, *ids.shape), normal(rng, 8)
    sums = [np.asarray(apply_experts(problem)(x, weights, ids, factors)[0]) for problem in problems]
    for other in sums[1:]:
        assert same_bits(other, sums[0])


@every_problem
@pytest.mark.quick("dp1-ep8-T24", "dp2-ep4-T9-routed")
def test_two_runs_give_the_same_bits(problem, rng):
    _, weights, ids, factors = inputs(problem, rng, used=[0, 1])
    x = normal(rng, problem.all_tokens, problem.hidden)
    assert same_bits(apply_experts(problem)(x, weights, ids, factors), apply_experts(problem)(x, weights, ids, factors))


def test_routes_are_for_what_one_round_holds():
    """A plan of several rounds is of blocks, whose rows of other rounds stay where they are."""
    problem = dataclasses.replace(DP2_EP4, transport="routed")
    kinds = []
    for slab in (None, 2):
        narrow = dataclasses.replace(problem, slab=slab)
        plan = jax.eval_shape(
            over_chips(narrow, lambda ids, way=narrow.way: pick_transport(way).plan_rows(ids, way)),
            jax.ShapeDtypeStruct((problem.all_tokens, problem.top_k), jnp.int32),
        )
        kinds.append(type(plan.blocks))
    assert kinds == [Routes, Blocks]


def test_without_a_mesh(rng):
    x, weights, ids, factors = inputs(ONE_CHIP, rng)
    y = run_alone(x, weights, ids, factors, Way(Placement(4)))
    np.testing.assert_array_equal(y, expected_sum(x, weights, ids, factors))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sum_comes_in_the_dtype_that_is_asked_for(dtype, rng):
    args = map(jnp.asarray, inputs(EP2, rng))
    x, weights, ids, factors = args
    way = Way(Placement(4))
    y = exchange(x, weights, ids, scale_by_expert, factors, way, preferred_element_type=dtype)
    assert y.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "problem",
    [dataclasses.replace(p, transport=name) for p in (EP8, DP2_EP4) for name in (*IN_ROUNDS, "hierarchical")],
    ids=str,
)
@pytest.mark.quick("dp2-ep4-T9-dense", "dp2-ep4-T9-hier*")
def test_rows_in_8_bits_travel_as_they_are(problem, rng):
    """They are rounded by nobody: experts get them bit for bit, with their scales."""
    _, weights, ids, factors = inputs(problem, rng)
    x = quantize(normal(rng, problem.all_tokens, problem.hidden), "int8", scaling="per_row")

    def experts(factors, rows, group_sizes):
        assert isinstance(rows, QTensor)
        return scale_by_expert(factors, dequantize(rows), group_sizes)

    def on_chip(values, scale, weights, ids, factors):
        return exchange(QTensor(values, scale), weights, ids, experts, factors, problem.way)

    y = over_chips(problem, on_chip, num_by_expert=1)(x.values, x.scale, weights, ids, factors)
    expected = expected_sum(dequantize(x), weights, ids, factors)
    assert relative_error(y.reshape(expected.shape), expected) < LIMIT["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_in_8_bits_come_back_as_the_experts_give_them(dtype, rng):
    """Not wider, when sums of them travel on."""

    def experts(params, rows, group_sizes):
        return dequantize(rows, dtype)

    x = quantize(normal(rng, 4, 128), scaling="1x128")
    assert result_dtype(experts, (), x, over(2)) == jnp.dtype(dtype)


def test_a_transport_that_is_not_there():
    with pytest.raises(ValueError, match=r"transport must be one of 'auto', 'dense'.*, got 'post'"):
        pick_transport(dataclasses.replace(over(2), transport="post"))


def test_where_experts_are_not_split_nothing_travels_whatever_is_named():
    assert pick_transport(Way(Placement(4), transport="dense")) is one_chip


def test_a_transport_says_how_many_rows_it_holds(rng):
    for problem in (EP2, EP8, ONE_CHIP, *EVERY_TRANSPORT):
        seen = []

        def experts(factors, rows, group_sizes, seen=seen):
            seen.append(rows.shape[0])
            return scale_by_expert(factors, rows, group_sizes)

        def on_chip(*args, problem=problem, experts=experts):
            return exchange(*args[:3], experts, args[3], problem.way)

        jax.eval_shape(over_chips(problem, on_chip, num_by_expert=1), *inputs(problem, rng))
        assert set(seen) == {problem.rows_held}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 4 * 256),
        ({"max_rows": 3}, 4 * 2 * 3),
        ({"max_choices": 32}, 4 * 8),
        ({"placement": Placement(8, 2)}, 2 * 256),
    ],
)
def test_buffers_are_for_the_rows_that_there_can_be(changes, rows):
    """Of 256 choices on each of 4 chips with 2 experts: all, from every chip, or what a bound leaves."""
    way = dataclasses.replace(over(4), **({"placement": Placement(8, 4)} | changes))
    if "placement" in changes:
        way = dataclasses.replace(way, axes=over(2).axes)
    assert pick_transport(way).rows_held(128, 2, way) == rows


@pytest.mark.parametrize("used", [[2], None], ids=["one expert", "all"])
@pytest.mark.parametrize(("chips", "transport", "most"), [(8, "ragged", 40), (4, "routed", 30)])
@pytest.mark.quick("4-routed-30-all")
def test_choices_beyond_a_bound_are_left_out(used, chips, transport, most, rng):
    """No more rows leave a chip than it has for them: those of the first experts, in several rounds or in one."""
    problem = dataclasses.replace(EP8, ep=chips, transport=transport)
    x, weights, ids, factors = inputs(problem, rng, used=used)
    way = dataclasses.replace(problem.way, max_choices=most)

    def on_chip(x, weights, ids, factors):
        return exchange(x, weights, ids, scale_by_expert, factors, way)

    y = over_chips(problem, on_chip, num_by_expert=1)(x, weights, ids, factors)
    kept = ids.copy()
    for own in np.split(kept, problem.ep):
        choices = own.reshape(-1)
        made = np.flatnonzero(choices >= 0)
        choices[made[np.argsort(choices[made], stable=True)][most:]] = -1
    assert not np.array_equal(kept, ids)
    np.testing.assert_array_equal(np.asarray(y).reshape(x.shape), expected_sum(x, weights, kept, factors))


def over(ep: int) -> Way:
    return Way(Placement(4, ep), Axes(expert=("expert",), tokens=("expert",), sizes=(("expert", ep),)))


def run_alone(x, weights, ids, factors, way):
    x, weights, ids, factors = jax.tree.map(jnp.asarray, (x, weights, ids, factors))
    return exchange(x, weights, ids, scale_by_expert, factors, way)

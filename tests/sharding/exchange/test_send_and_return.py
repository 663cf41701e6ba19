"""Every row arrives once, where it should, as it was; and comes back. Against plain loops, for every kind of load."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pallas_kernels.quantize import dequantize, quantize
from sharding.exchange.wire import Wire
from tests.helpers import normal, relative_error, same_bits
from tests.sharding.exchange.exchanges import (
    IN_ROUNDS,
    Problem,
    gradient_of_sending,
    groups_that_arrived,
    over_chips,
    random_ids,
    send_and_return,
    tokens_for,
)

EP2 = Problem(dp=1, ep=2, num_tokens=5, top_k=2, num_experts=4)
EP4 = Problem(dp=1, ep=4, num_tokens=6, top_k=3, num_experts=8)
EP8 = Problem(dp=1, ep=8, num_tokens=24, top_k=2, num_experts=8)
DP2_EP4 = Problem(dp=2, ep=4, num_tokens=9, top_k=2, num_experts=8)
EXACT = [dataclasses.replace(problem, transport="ragged") for problem in (EP4, EP8, DP2_EP4)]
IN_HOPS = [
    dataclasses.replace(DP2_EP4, transport="hierarchical"),
    Problem(dp=1, ep=8, num_tokens=6, top_k=3, num_experts=16, transport="hierarchical", nodes=2, slab=36),
    Problem(dp=1, ep=8, num_tokens=6, top_k=3, num_experts=16, transport="hierarchical", nodes=4, slab=72),
]
PROBLEMS = [EP2, EP4, EP8, DP2_EP4, *EXACT, *IN_HOPS]
pytestmark = pytest.mark.usefixtures("own_transports")
with_wires = pytest.mark.parametrize("transport", [*IN_ROUNDS, "routed", "hierarchical"])
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def tagged(problem: Problem) -> np.ndarray:
    """Small whole numbers, no two rows alike, the first column the number of the token."""
    token = np.arange(1, problem.all_tokens + 1)[:, None]
    return (token * (1 + np.arange(problem.hidden)) % 1009).astype(np.float32)


def check(problem: Problem, ids: np.ndarray) -> None:
    """Each row arrives once for each choice of its expert, and comes back as often."""
    x = tagged(problem)
    arrived, sizes, back = send_and_return(problem)(x, ids)
    groups = groups_that_arrived(arrived, sizes)
    for chip, chip_wants in enumerate(tokens_for(problem, ids)):
        for expert, tokens in enumerate(chip_wants):
            rows = sorted(map(tuple, groups[chip][expert]))
            assert rows == sorted(map(tuple, x[tokens])), f"chip {chip}, local expert {expert}"
    expected = x * (ids >= 0).sum(1, keepdims=True)
    np.testing.assert_array_equal(np.asarray(back).reshape(x.shape), expected)


def test_problems_take_one_round_and_several():
    assert [problem.slab_and_rounds[1] for problem in PROBLEMS if problem not in IN_HOPS] == [1, 1, 3, 1, 1, 3, 1]


@every_problem
@given(data=st.data())
@pytest.mark.quick("dp1-ep8-T24")
def test_random_loads(data, problem):
    """Repeated experts within a token, and choices not made, included."""
    shape = (problem.all_tokens, problem.top_k)
    check(problem, data.draw(arrays(np.int32, shape, elements=st.integers(-1, problem.num_experts - 1))))


@every_problem
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@pytest.mark.quick("dp2-ep4-T9")
def test_skewed_loads(seed, data, problem):
    used = data.draw(st.lists(st.integers(0, problem.num_experts - 1), max_size=3))
    silent = data.draw(st.lists(st.integers(0, problem.dp * problem.ep - 1), max_size=problem.ep))
    check(problem, random_ids(problem, np.random.default_rng(seed), used, silent))


@pytest.mark.parametrize("problem", [EP2, EP4, EXACT[0]], ids=str)
def test_every_pattern_of_empty_experts(problem, rng):
    for used in itertools.product([False, True], repeat=problem.num_experts):
        check(problem, random_ids(problem, rng, np.flatnonzero(used)))


@pytest.mark.parametrize("problem", [EP4, DP2_EP4, EXACT[-1]], ids=str)
def test_every_pattern_of_ranks_without_tokens(problem, rng):
    for silent in itertools.product([False, True], repeat=problem.ep):
        check(problem, random_ids(problem, rng, silent=np.flatnonzero(silent)))


@every_problem
@pytest.mark.quick("dp1-ep4-T6", "dp1-ep8-T24")
def test_all_tokens_to_one_expert(problem):
    """The worst load: it fills every slab for one rank in every round, and all others are empty."""
    for expert in range(problem.num_experts):
        check(problem, np.full((problem.all_tokens, problem.top_k), expert, np.int32))


@every_problem
@pytest.mark.quick("dp1-ep8-T24", "dp2-ep4-T9*")
def test_one_token(problem):
    for token in {0, problem.num_tokens, problem.all_tokens - 1}:
        ids = np.full((problem.all_tokens, problem.top_k), -1, np.int32)
        ids[token, 0] = problem.num_experts - 1
        check(problem, ids)


@every_problem
@pytest.mark.quick("*-T[569]", "*-T24*", "*-ragged", "*-2x2")
def test_no_token(problem):
    check(problem, np.full((problem.all_tokens, problem.top_k), -1, np.int32))


@every_problem
@pytest.mark.quick("*-T[569]", "*-T24*", "*-ragged", "*-2x2")
def test_balanced_load_fits_the_first_round(problem):
    ids = np.arange(problem.all_tokens * problem.top_k, dtype=np.int32).reshape(-1, problem.top_k)
    check(problem, ids % problem.num_experts)
    _, sizes, _ = send_and_return(problem)(tagged(problem), ids % problem.num_experts)
    assert not np.asarray(sizes)[:, 1:].any()


@pytest.mark.parametrize("transport", IN_ROUNDS)
def test_every_choice_leaves_in_one_round(transport, rng):
    """In the others it has no row, as what comes back there for rows that nobody sent may be anything."""
    problem = dataclasses.replace(EP8, transport=transport)
    slab, rounds = problem.slab_and_rounds

    def on_chip(ids):
        choices = problem.carrier.prepare(ids, problem.way)
        plans = [problem.carrier.plan_round(choices, slab, index, problem.way).departure for index in range(rounds)]
        return jnp.stack([plan.inverse for plan in plans]), jnp.stack([plan.order for plan in plans])

    ids = random_ids(problem, rng, used=[0, 5])
    inverse, order = over_chips(problem, on_chip)(ids)
    leaves = np.asarray(inverse) >= 0  # [chips, rounds, T, K]
    np.testing.assert_array_equal(leaves.sum(1).reshape(ids.shape), ids >= 0)
    assert leaves.any((0, 2, 3)).sum() > 1
    np.testing.assert_array_equal((np.asarray(order) >= 0).sum(2), leaves.sum((2, 3)))


@pytest.mark.parametrize(
    ("wire", "hidden"),
    [
        (Wire("float8_e4m3fn", "1x128"), 256),
        (Wire("float8_e4m3fn", "per_row"), 48),
        (Wire("float8_e5m2", "per_row"), 48),
        (Wire("int8", "1x128"), 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@with_wires
@pytest.mark.quick("*float32-*int8*")
def test_rows_travel_in_8_bits_as_quantised_and_no_other_way(transport, dtype, wire, hidden, rng):
    problem = Problem(2, 4, 9, 2, 8, hidden, wire=wire, transport=transport)
    x = normal(rng, problem.all_tokens, hidden, dtype=dtype) * jnp.asarray(2.0 ** rng.integers(-9, 9), dtype)
    ids = random_ids(problem, rng)
    arrived, sizes, back = send_and_return(problem)(x, ids)
    assert arrived.dtype == x.dtype
    rounded = np.asarray(dequantize(quantize(x, wire.dtype, scaling=wire.scaling), x.dtype))
    assert not np.array_equal(rounded, x)
    groups = groups_that_arrived(arrived, sizes)
    for chip, chip_wants in enumerate(tokens_for(problem, ids)):
        for expert, tokens in enumerate(chip_wants):
            rows = sorted(row.tobytes() for row in groups[chip][expert])
            assert rows == sorted(row.tobytes() for row in rounded[tokens])
    count = (ids >= 0).sum(1, keepdims=True)
    assert relative_error(np.asarray(back).reshape(x.shape), rounded.astype(np.float32) * count) < 1e-2


@with_wires
@pytest.mark.quick("routed")
def test_a_row_of_nan_stays_with_its_token(transport, rng):
    """Neither a scale nor a neighbour's row takes it up, on the wire as off it."""
    for wire in (None, Wire()):
        problem = Problem(1, 4, 6, 3, 8, 128, wire=wire, transport=transport)
        x, ids = normal(rng, problem.all_tokens, 128), random_ids(problem, rng)
        ids[3] = [0, 4, 7]
        ids[8] = -1
        _, _, clean = send_and_return(problem)(x, ids)
        _, _, back = send_and_return(problem)(x.at[3].set(jnp.nan).at[8].set(jnp.nan), ids)
        clean, back = (np.asarray(rows).reshape(x.shape) for rows in (clean, back))
        assert np.isnan(back[3]).all()
        others = np.arange(problem.all_tokens) != 3
        np.testing.assert_array_equal(back[others], clean[others])


@pytest.mark.parametrize("wire", [None, Wire()], ids=["", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@with_wires
@pytest.mark.quick("routed-float32-fp8")
def test_gradient_is_the_transpose_and_not_rounded_to_8_bits(transport, dtype, wire, rng):
    gradient, expected = gradient_and_sum(Problem(2, 4, 9, 2, 8, 128, wire=wire, transport=transport), dtype, rng)
    assert relative_error(gradient, expected) < {"float32": 1e-6, "bfloat16": 5e-3}[dtype]


@with_wires
@pytest.mark.quick("dense", "routed")
def test_gradients_travel_in_8_bits_where_that_is_asked_for(transport, rng):
    """Each row is rounded once on its way, or twice where it goes in two hops."""
    problem = Problem(2, 4, 9, 2, 8, 128, wire=Wire(), transport=transport, cotangent_dtype="float8_e5m2")

    def rounded(rows):
        return dequantize(quantize(rows, "float8_e5m2", scaling="per_row"), rows.dtype)

    gradient, expected = gradient_and_sum(problem, "float32", rng, rounded)
    assert relative_error(gradient, expected) < (0.1 if transport == "hierarchical" else 1e-6)


@pytest.mark.parametrize("transport", ["dense", "ragged", "routed"])
@pytest.mark.quick("dense", "routed")
def test_gradients_of_what_travels_beside_rows_stay_as_they_are(transport, rng):
    """Those of the router's weights among them, which are no rows."""
    problem = Problem(2, 4, 9, 2, 8, transport=transport)
    ids, beside = random_ids(problem, rng), normal(rng, problem.all_tokens, 3)
    direction = normal(rng, problem.dp * problem.ep * problem.rows_held, 3)

    def gradient(problem):
        way, carrier = problem.way, problem.carrier

        def on_chip(ids, beside, direction):
            plan = carrier.plan_rows(ids, way)
            _, pullback = jax.vjp(lambda beside: carrier.send_beside(beside, plan, way), beside)
            return pullback(direction)[0]

        return over_chips(problem, on_chip)(ids, beside, direction)

    assert same_bits(gradient(dataclasses.replace(problem, cotangent_dtype="float8_e5m2")), gradient(problem))


@with_wires
@pytest.mark.slow
def test_gradients_in_8_bits_have_derivatives(transport, rng):
    """Those of what moves rows; dense slabs round the tangents of gradients too."""
    problem = Problem(2, 4, 9, 2, 8, 128, transport=transport, cotangent_dtype="float8_e5m2")
    plain = dataclasses.replace(problem, cotangent_dtype=None)
    ids, x, v = random_ids(problem, rng), *(normal(rng, problem.all_tokens, 128) for _ in range(2))

    def curvature(problem):
        def loss(x):
            return jnp.square(send_and_return(problem)(x, ids)[2]).sum()

        return jax.jvp(jax.grad(loss), (x,), (v,))[1]

    limit = 0.1 if transport in ("dense", "hierarchical") else 1e-5
    assert relative_error(curvature(problem), curvature(plain)) < limit


def gradient_and_sum(problem: Problem, dtype: str, rng, rounded=lambda rows: rows) -> tuple[np.ndarray, np.ndarray]:
    """The gradient [tokens, H] of what arrives, and the sum of its rows, as found by sending numbers the same way."""
    plain = dataclasses.replace(problem, wire=None, cotangent_dtype=None)
    ids = random_ids(problem, rng)
    direction = normal(rng, problem.dp * problem.ep * problem.rows_held, 128, dtype=dtype)
    arrived, _, _ = send_and_return(plain)(tagged(plain), ids)
    tokens = np.asarray(arrived)[:, 0, :, 0].reshape(-1).astype(int) - 1

    _, gradient = gradient_of_sending(problem)(normal(rng, problem.all_tokens, 128, dtype=dtype), ids, direction)
    assert gradient.dtype == jnp.dtype(dtype)
    expected = np.zeros((problem.all_tokens, 128))
    np.add.at(expected, tokens[tokens >= 0], np.asarray(rounded(direction)).astype(np.float64)[tokens >= 0])
    return np.asarray(gradient).reshape(expected.shape), expected


@every_problem
@pytest.mark.quick("*-T[569]", "*-T24*", "*-ragged", "*-2x2")
def test_two_runs_give_the_same_bits(problem, rng):
    x, ids = normal(rng, problem.all_tokens, problem.hidden), random_ids(problem, rng)
    assert same_bits(send_and_return(problem)(x, ids), send_and_return(problem)(x, ids))

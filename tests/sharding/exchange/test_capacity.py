"""Capacities and what is dropped: against plain loops, on one chip and over eight that hold the batch in many ways."""

import collections
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec

from sharding.exchange.capacity import count_dropped, expert_capacity, limit_to_capacity
from sharding.mesh import make_mesh
from sharding.tokens import Tokens

SEQUENCES, LENGTH, TOP_K, NUM_EXPERTS = 8, 8, 3, 8
NUM_TOKENS = SEQUENCES * LENGTH
ids_of_tokens = arrays(np.int32, (NUM_TOKENS, TOP_K), elements=st.integers(-1, NUM_EXPERTS - 1))
real_tokens = arrays(np.bool_, NUM_TOKENS)
factors = st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, 100.0])


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "factor", "rows"),
    [
        (16, 2, 8, 1.0, 4),
        (16, 2, 8, 1.25, 5),
        (15, 2, 8, 1.0, 4),
        (1, 1, 256, 1.0, 1),
        (0, 2, 8, 1.0, 1),
        (10, 1, 10, 1.1, 2),
        (1000, 1, 10, 1.1, 110),  # in float32, 1.1 · 100 is more than 110
        (16, 2, 8, 100.0, 32),  # there are no more choices
    ],
)
def test_expert_capacity(num_tokens, top_k, num_experts, factor, rows):
    assert expert_capacity(num_tokens, top_k, num_experts, factor) == rows


traced_capacity = jax.jit(expert_capacity, static_argnums=(1, 2, 3))


@given(
    num_tokens=st.integers(0, 2**24),
    top_k=st.sampled_from([1, 2, 8, 60]),
    num_experts=st.sampled_from([1, 7, 8, 128, 384, 4096]),
    factor=st.sampled_from([1e-4, 0.001, 0.3, 1 / 3, 1.0, 1.1, 1.25, 1.999, 2.0, 7.5, 1e3, 1e9]),
)
@example(num_tokens=2**24, top_k=60, num_experts=4096, factor=1.999)
@example(num_tokens=2**24, top_k=60, num_experts=1, factor=1.0)
def test_capacity_while_tracing_is_that_of_before(num_tokens, top_k, num_experts, factor):
    known = expert_capacity(num_tokens, top_k, num_experts, factor)
    assert int(traced_capacity(jnp.int32(num_tokens), top_k, num_experts, factor)) == known
    exact = Fraction(factor).limit_denominator(1000)
    exact = max(min(exact, Fraction(num_experts)), Fraction(1, 1000))
    assert known == max(1, math.ceil(exact * num_tokens * top_k / num_experts))


@given(num_tokens=st.integers(1, 10**6), thousandths=st.integers(1, 4000))
def test_factors_count_in_thousandths(num_tokens, thousandths):
    """As a float, and as the float beside it."""
    exact = max(1, -(-num_tokens * 2 * thousandths // 8000))
    for factor in (thousandths / 1000, np.nextafter(thousandths / 1000, 0), float(np.float32(thousandths / 1000))):
        assert expert_capacity(num_tokens, 2, 8, factor) == exact


def keep_within(ids, capacity):
    """First choices before second ones, earlier tokens before later ones."""
    kept, taken = np.full_like(ids, -1), collections.Counter()
    for k in range(ids.shape[1]):
        for token in range(ids.shape[0]):
            expert = ids[token, k]
            if expert >= 0 and taken[expert] < capacity:
                taken[expert] += 1
                kept[token, k] = expert
    return kept


def capacity_of(real, factor):
    return expert_capacity(max(int(np.sum(real)), 1), TOP_K, NUM_EXPERTS, factor)


@functools.partial(jax.jit, static_argnames=("factor", "scope"))
def on_one_chip(ids, real, factor, scope):
    tokens = Tokens.on_one_chip(NUM_TOKENS, LENGTH, real)
    kept, most = limit_to_capacity(ids, NUM_EXPERTS, factor, tokens, scope)
    return kept, most, count_dropped(ids, kept, NUM_EXPERTS)


@pytest.mark.parametrize("scope", ["batch", "chip"])
@given(ids=ids_of_tokens, real=real_tokens, factor=factors)
def test_on_one_chip_equals_a_plain_loop(ids, real, factor, scope):
    ids = np.where(real[:, None], ids, -1)
    kept, most, dropped = on_one_chip(ids, real, factor, scope)
    expected = keep_within(ids, capacity_of(real, factor))
    np.testing.assert_array_equal(kept, expected)
    assert dropped.tolist() == [int(((ids == e) & (expected != e)).sum()) for e in range(NUM_EXPERTS)]
    assert np.bincount(expected[expected >= 0], minlength=NUM_EXPERTS).max() <= most


def test_first_choices_have_precedence():
    ids = jnp.array([[1, 0], [0, 1], [2, 0]], jnp.int32)
    kept, most = limit_to_capacity(ids, 3, 0.5, Tokens.on_one_chip(3), "batch")
    assert kept.tolist() == [[1, -1], [0, -1], [2, -1]]
    assert most == 1


def test_room_for_repeated_experts():
    """A token that asks twice for an expert takes two of its places: more than there are tokens."""
    ids = jnp.zeros((4, 2), jnp.int32)
    kept, most = limit_to_capacity(ids, 2, 2.0, Tokens.on_one_chip(4), "batch")
    assert kept.tolist() == ids.tolist()
    assert most == 8


LAYOUTS = {
    "sequences": PartitionSpec(("data", "expert"), None),
    "positions": PartitionSpec(None, ("data", "expert")),
    "both": PartitionSpec("data", "expert"),
    "both, turned": PartitionSpec("expert", "data"),
    "positions, turned": PartitionSpec(None, ("expert", "data")),
}
"""How [8, 8] tokens lie on two rows of four chips."""


@functools.cache
def over_chips(layout: str, factor: float, scope: str):
    """(ids, real) -> ids that are kept, drops of all chips, and whether `most` is enough on each chip."""
    mesh, spec, shape = make_mesh(ep=4, dp=2), LAYOUTS[layout], (SEQUENCES, LENGTH)

    def on_chip(ids, real, index):
        run = index.shape[1] if spec[1] else index.size
        tokens = Tokens(index.reshape(-1), NUM_TOKENS, LENGTH, ("data", "expert"), run, real.reshape(-1))
        ids = ids.reshape(-1, TOP_K)
        kept, most = limit_to_capacity(ids, NUM_EXPERTS, factor, tokens, scope)
        load = (kept[:, :, None] == jnp.arange(NUM_EXPERTS)).sum((0, 1))
        dropped = tokens.sum(count_dropped(ids, kept, NUM_EXPERTS))
        fits = tokens.sum((load > most).sum()) == 0
        return kept.reshape(*real.shape, TOP_K), dropped, fits

    whole = PartitionSpec()
    run = jax.shard_map(
        on_chip, mesh=mesh, in_specs=(spec, spec, spec), out_specs=(spec, whole, whole), check_vma=False
    )

    @jax.jit
    def limited(ids, real):
        index = jnp.arange(NUM_TOKENS, dtype=jnp.int32).reshape(shape)
        return run(ids.reshape(*shape, TOP_K), real.reshape(shape), index)

    return limited


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@given(ids=ids_of_tokens, real=real_tokens)
@pytest.mark.quick("1.0-positions, turned", "0.5-both, turned", "1.25-sequences")
def test_over_eight_chips_equals_one(ids, real, factor, layout):
    """The same choices are dropped, wherever a token lies."""
    ids = np.where(real[:, None], ids, -1)
    kept, dropped, fits = over_chips(layout, factor, "batch")(ids, real)
    expected, _, expected_dropped = on_one_chip(ids, real, factor, "batch")
    np.testing.assert_array_equal(np.asarray(kept).reshape(ids.shape), expected)
    np.testing.assert_array_equal(expected, keep_within(ids, capacity_of(real, factor)))
    np.testing.assert_array_equal(dropped, expected_dropped)
    assert fits


@pytest.mark.parametrize("layout", ["positions", "both"])
@given(ids=ids_of_tokens, real=real_tokens)
def test_chips_that_count_by_themselves(ids, real, layout):
    """A capacity of each chip, of its own real tokens."""
    ids = np.where(real[:, None], ids, -1)
    kept, dropped, fits = over_chips(layout, 1.25, "chip")(ids, real)
    owner = chip_of_token(layout)
    expected = np.full_like(ids, -1)
    for chip in range(8):
        here = owner == chip
        expected[here] = keep_within(ids[here], capacity_of(real[here], 1.25))
    np.testing.assert_array_equal(np.asarray(kept).reshape(ids.shape), expected)
    lost = ids[ids != expected]
    assert dropped.tolist() == np.bincount(lost, minlength=NUM_EXPERTS).tolist()
    assert fits


def chip_of_token(layout: str) -> np.ndarray:
    """[T], a number for each chip."""
    sequence, position = np.divmod(np.arange(NUM_TOKENS), LENGTH)
    return position if layout == "positions" else sequence // 4 * 4 + position // 2

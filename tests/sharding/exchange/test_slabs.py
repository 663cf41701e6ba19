"""Sizes and slots of an exchange against plain Python."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sharding.exchange.capacity import expert_capacity
from sharding.exchange.room import fit_slab
from sharding.exchange.slabs import plan_arrival, plan_departure, sort_by_rank
from sharding.placement import Placement

NUM_TOKENS, TOP_K, NUM_EXPERTS = 13, 3, 8
ids_of_tokens = arrays(np.int32, (NUM_TOKENS, TOP_K), elements=st.integers(-1, NUM_EXPERTS - 1))
sizes = {
    "num_tokens": st.integers(1, 5000),
    "top_k": st.integers(1, 9),
    "num_local": st.integers(1, 64),
    "ep": st.sampled_from([2, 4, 8, 16, 32]),
}


@given(**sizes, factor=st.none() | st.floats(0.1, 4))
def test_slabs_hold_any_load_and_stay_small(num_tokens, top_k, num_local, ep, factor):
    capacity = None if factor is None else expert_capacity(num_tokens, top_k, num_local * ep, factor)
    slab, rounds = fit_slab(num_tokens, top_k, num_local, ep, capacity)
    assignments = num_tokens * top_k
    worst = assignments if capacity is None else min(assignments, num_local * capacity)
    assert slab >= 1
    assert (rounds - 1) * slab < worst <= rounds * slab
    assert ep * slab <= 4 * assignments + 16 * ep
    if rounds > 1:
        assert slab >= 2 * assignments / ep  # a balanced load, and twice that, takes one round


@given(**sizes, choices=st.integers(1, 5000))
def test_slabs_where_few_of_the_choices_are_made(num_tokens, top_k, num_local, ep, choices):
    """Buffers are for the choices that are made, twice the balanced load; rounds are enough for all that could be."""
    slab, rounds = fit_slab(num_tokens, top_k, num_local, ep, None, choices=choices)
    assert rounds * slab >= num_tokens * top_k
    assert ep * slab <= 4 * choices + 16 * ep
    if rounds > 1:
        assert slab >= 2 * choices / ep


@functools.cache
def departures(ep: int, slab: int, rounds: int):
    """All rounds of one rank, jitted: a list of (plan, experts)."""
    placement = Placement(NUM_EXPERTS, ep)

    @jax.jit
    def run(ids):
        choices = sort_by_rank(ids, placement)
        return [plan_departure(choices, placement, slab, index) for index in range(rounds)]

    return run


@pytest.mark.parametrize(("ep", "slab", "rounds"), [(2, 39, 1), (2, 16, 3), (4, 8, 5), (8, 5, 8)])
@given(ids=ids_of_tokens)
@pytest.mark.quick("2-39-1", "8-5-8")
def test_every_assignment_leaves_once_from_a_slot_for_its_rank(ids, ep, slab, rounds):
    num_local = NUM_EXPERTS // ep
    left = []
    for departure, experts in departures(ep, slab, rounds)(ids):
        order, inverse, experts = (np.asarray(a) for a in (departure.order, departure.inverse, experts))
        assert order.shape == experts.shape == (ep * slab,)
        assert int(departure.dropped) == 0
        for slot in np.flatnonzero(order >= 0):
            token, k = divmod(int(order[slot]), TOP_K)
            left.append((token, k))
            assert inverse[token, k] == slot
            assert slot // slab * num_local + experts[slot] == ids[token, k]
        assert (experts[order < 0] == -1).all()
        assert (inverse >= 0).sum() == (order >= 0).sum()
        filled = (order >= 0).reshape(ep, slab)
        assert departure.group_sizes.tolist() == filled.sum(1).tolist()
        assert all(row[: row.sum()].all() for row in filled)  # slabs fill from the front
    assert sorted(left) == [tuple(place) for place in np.argwhere(ids >= 0).tolist()]


@given(experts=arrays(np.int32, 24, elements=st.integers(-1, 3)))
def test_arrivals_are_sorted_by_expert(experts):
    plan = arrival(experts)
    slots = [slot for expert in range(4) for slot in np.flatnonzero(experts == expert)]
    assert plan.order.tolist() == slots + [-1] * (24 - len(slots))
    assert plan.group_sizes.tolist() == [int((experts == e).sum()) for e in range(4)]


arrival = jax.jit(lambda experts: plan_arrival(experts, Placement(8, 2)))


def test_the_largest_layer_fits_into_int32():
    """Row numbers stay below 2³¹ for a million tokens on a chip, although its elements do not."""
    slab, rounds = fit_slab(2**20, 8, 8, 32, None)
    assert 32 * slab < 2**31 < 32 * slab * 7168
    assert math.ceil(2**23 / slab) == rounds
    assert rounds * slab < 2**31

"""The slot that each choice of an expert with replicas goes to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sharding.replicas import Replicas

EXPERTS = np.array([2, 0, 1, 2, 2, 0])  # expert 0 in slots 1 and 5, 1 in 2, 2 in 0, 3 and 4
spread = jax.jit(lambda ids, turn: Replicas.of(EXPERTS, 3).spread(ids, turn=turn))


def test_choices_take_the_slots_in_turn():
    ids = jnp.array([[2, 0], [2, -1], [0, 2], [2, 1], [3, 2]], jnp.int32)
    assert spread(ids, 0).tolist() == [[0, 1], [3, -1], [5, 4], [0, 2], [-1, 3]]
    assert spread(ids, 1).tolist() == [[3, 5], [4, -1], [1, 0], [3, 2], [-1, 4]]


@given(ids=arrays.arrays(np.int32, (13, 2), elements=st.integers(-2, 4)), turn=st.integers(0, 7))
def test_slots_hold_their_expert_and_differ_by_one_row_at_most(ids, turn):
    slots = np.asarray(spread(jnp.asarray(ids), turn))
    is_made = (ids >= 0) & (ids < 3)
    assert (slots[~is_made] == -1).all()
    np.testing.assert_array_equal(EXPERTS[slots[is_made]], ids[is_made])
    rows = np.bincount(slots[is_made], minlength=6)
    for expert in range(3):
        own = rows[expert == EXPERTS]
        assert own.max() - own.min() <= 1


def test_gradients_of_replicas_are_added_up():
    gradients = jnp.arange(12.0).reshape(6, 2)
    total = Replicas.of(EXPERTS, 3).add_up(gradients)
    for slot, expert in enumerate(EXPERTS):
        np.testing.assert_array_equal(total[slot], gradients[expert == EXPERTS].sum(0))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([0.0, 1.0], r"experts must be integers \[P\], got float64\[2\]"),
        ([[0, 1]], r"experts must be integers \[P\], got int64\[1, 2\]"),
        ([0, 1, 3], r"experts must be in \[0, 3\), got 0 to 3"),
        ([0, -1, 2], r"experts must be in \[0, 3\), got -1 to 2"),
        ([0, 2, 2], "every expert needs a slot, and expert 1 has none"),
    ],
)
def test_what_is_no_arrangement(experts, message):
    with pytest.raises(ValueError, match=message):
        Replicas.of(np.array(experts), 3)

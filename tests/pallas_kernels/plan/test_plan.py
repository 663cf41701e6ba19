import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.plan import Plan, make_plan, take_slots
from tests.helpers import raises_saying, same_bits
from tests.pallas_kernels.plan.plans import expected_plan, planned

hypothesis = pytest.importorskip("hypothesis")
arrays = pytest.importorskip("hypothesis.extra.numpy").arrays
st = hypothesis.strategies

# Few shapes, so that few programs are compiled: tokens, choices, groups, capacity.
SMALL = [(1, 1, 1, None), (7, 2, 3, None), (43, 3, 5, None), (7, 2, 3, 2), (43, 3, 5, 11), (9, 3, 2, 40)]


@st.composite
def problems(draw):
    """(topk_ids, num_groups, capacity); ids reach two beyond both ends of the valid range, and repeat in a token."""
    num_tokens, top_k, num_groups, capacity = draw(st.sampled_from(SMALL))
    ids = draw(arrays(np.int32, (num_tokens, top_k), elements=st.integers(-2, num_groups + 1)))
    return ids, num_groups, capacity


def check_plan(plan: Plan, ids, num_groups, capacity):
    for name, expected in expected_plan(ids, num_groups, capacity).items():
        field = getattr(plan, name)
        assert field.dtype == jnp.int32
        np.testing.assert_array_equal(field, expected, err_msg=name)


@hypothesis.given(problems())
def test_equals_placing_assignments_one_by_one(problem):
    ids, num_groups, capacity = problem
    check_plan(planned(ids, num_groups, capacity=capacity), ids, num_groups, capacity)


@hypothesis.given(problems())
def test_order_and_inverse_undo_each_other(problem):
    ids, num_groups, capacity = problem
    plan = planned(ids, num_groups, capacity=capacity)
    order, inverse = np.asarray(plan.order), np.asarray(plan.inverse).reshape(-1)
    rows = np.flatnonzero(order >= 0)
    np.testing.assert_array_equal(inverse[order[rows]], rows)
    assignments = np.flatnonzero(inverse >= 0)
    np.testing.assert_array_equal(order[inverse[assignments]], assignments)
    assert len(rows) == len(assignments) == plan.group_sizes.sum()


@hypothesis.given(problems())
def test_every_assignment_is_in_its_group_or_counted(problem):
    ids, num_groups, capacity = problem
    plan = planned(ids, num_groups, capacity=capacity)
    flat, inverse = ids.reshape(-1), np.asarray(plan.inverse).reshape(-1)
    valid = (flat >= 0) & (flat < num_groups)
    assert (inverse[~valid] == -1).all()
    assert (inverse[valid] == -1).sum() == plan.dropped
    placed = valid & (inverse >= 0)
    begin = np.asarray(plan.offsets)[flat[placed]]
    assert (inverse[placed] >= begin).all()
    assert (inverse[placed] < begin + np.asarray(plan.group_sizes)[flat[placed]]).all()
    if capacity is None:
        assert plan.dropped == 0
    else:
        assert (np.asarray(plan.group_sizes) <= capacity).all()


@hypothesis.given(problems())
def test_stable_within_a_group(problem):
    ids, num_groups, _ = problem
    plan = planned(ids, num_groups)
    for offset, size in zip(np.asarray(plan.offsets), np.asarray(plan.group_sizes), strict=True):
        assert (np.diff(np.asarray(plan.order)[offset : offset + size]) > 0).all()


@pytest.mark.parametrize("num_ids", [127, 128, 129, 255, 256, 257, 1000])
@pytest.mark.quick("128", "255", "257")
def test_sizes_around_the_block_of_the_sort(rng, num_ids):
    for top_k, capacity in ((1, None), (1, num_ids // 6)):
        ids = rng.integers(-1, 5, (num_ids, top_k)).astype(np.int32)
        check_plan(planned(ids, 5, capacity=capacity), ids, 5, capacity)


@pytest.mark.parametrize("capacity", [None, 30])
def test_many_experts(rng, capacity):
    ids = np.stack([rng.choice(256, 8, replace=False) for _ in range(125)]).astype(np.int32)
    check_plan(planned(ids, 256, capacity=capacity), ids, 256, capacity)


@pytest.mark.parametrize("ids", [np.zeros((300, 1)), np.full((300, 1), 4), np.full((300, 1), -1)], ids=str)
def test_all_in_one_group_or_none(ids):
    check_plan(planned(ids.astype(np.int32), 5), ids, 5, None)


def test_first_choices_before_second_and_earlier_tokens_first():
    # Group 0 is wanted by tokens 0 and 2 as first choice, and by token 1 as second.
    ids = jnp.array([[0, 1], [1, 0], [0, 1]])
    plan = planned(ids, 2, capacity=2)
    assert plan.inverse.tolist() == [[0, 3], [2, -1], [1, -1]]
    assert plan.group_sizes.tolist() == [2, 2]
    assert plan.dropped == 2


def test_worked_example_of_the_documentation():
    plan = make_plan(jnp.array([[2, 0], [0, 2], [2, 1]]), 3)
    assert plan.group_sizes.tolist() == [2, 1, 3]
    assert plan.offsets.tolist() == [0, 2, 3]
    assert plan.order.tolist() == [1, 2, 5, 0, 3, 4]
    assert plan.inverse.tolist() == [[3, 0], [1, 4], [5, 2]]


@pytest.mark.parametrize(("dtype", "num_groups"), [("uint8", 256), ("int8", 200), ("uint32", 4), ("int16", 4)])
def test_ids_of_every_integer_dtype(rng, dtype, num_groups):
    ids = rng.integers(0, min(num_groups, np.iinfo(dtype).max), (20, 2), dtype, endpoint=True)
    ids[0] = np.iinfo(dtype).max, np.iinfo(dtype).min
    for capacity in (None, 3):
        check_plan(planned(jnp.asarray(ids), num_groups, capacity=capacity), ids, num_groups, capacity)


def test_slots_of_ids_in_fewer_bits_than_there_are_groups():
    ids = np.array([[255, 3], [255, 44]], np.uint8)
    whole = planned(jnp.asarray(ids), 300)
    plan = take_slots(whole, jnp.asarray(ids), 1)
    assert plan.inverse.tolist() == [[255, 3], [-1, 44]]
    assert take_slots(whole, jnp.asarray(ids), 1, begin=1).inverse.tolist() == [[-1, -1], [255, -1]]


@pytest.mark.parametrize("shape", [(0, 2), (0, 1), (3, 0)])
@pytest.mark.parametrize("capacity", [None, 4])
def test_no_assignments(shape, capacity):
    plan = planned(jnp.zeros(shape, jnp.int32), 3, capacity=capacity)
    check_plan(plan, np.zeros(shape), 3, capacity)


@pytest.mark.parametrize("capacity", [None, 11])
def test_same_inputs_same_bits(rng, capacity):
    ids = jnp.asarray(rng.integers(-1, 6, (300, 3)), jnp.int32)
    first = planned(ids, 5, capacity=capacity)
    assert same_bits(first, planned(ids, 5, capacity=capacity))


def test_a_plan_passes_through_jit_and_tree_map():
    plan = planned(jnp.array([[0, 1]]), 2)
    assert isinstance(jax.tree.map(lambda leaf: leaf, plan), Plan)
    assert jax.jit(lambda plan: plan.inverse + 1)(plan).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(topk_ids=jnp.zeros(3, int)), ["topk_ids", "integer array [T, K]", "int32[3]"]),
        (dict(topk_ids=jnp.zeros((3, 1))), ["topk_ids", "integer array [T, K]", "float32[3, 1]"]),
        (dict(num_groups=0), ["num_groups", "at least 1", "got 0"]),
        (dict(capacity=0), ["capacity", "at least 1", "got 0", "None"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(arguments, parts):
    with raises_saying(ValueError, *parts):
        make_plan(**(dict(topk_ids=jnp.zeros((3, 1), int), num_groups=2) | arguments))

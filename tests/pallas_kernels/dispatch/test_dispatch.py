import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch, plan_and_dispatch
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import QTensor, ToRound, dequantize, quantize
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.kernels_tpu import is_interpreted, lower_for_tpu
from tests.pallas_kernels.plan.plans import jitted, planned

backend = every_backend("dispatch")

SHAPES = [(37, 3, 5, 19), (64, 4, 8, 256)]  # T, K, G, H


def random_plan(rng, tokens, top_k, groups, capacity=None, out_of_range=1):
    ids = rng.integers(-out_of_range, groups + out_of_range, (tokens, top_k))
    return planned(jnp.asarray(ids, jnp.int32), groups, capacity=capacity)


def gathered(x: np.ndarray, plan) -> np.ndarray:
    """Row by row: x[order // K], zeros where the order is −1."""
    top_k = plan.inverse.shape[1]
    return np.stack([x[a // top_k] if a >= 0 else np.zeros_like(x[0]) for a in np.asarray(plan.order)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.quick("pallas_tpu-(64, 4, 8, 256)-7-bfloat16", "xla-(37, 3, 5, 19)-7-float8_e4m3fn", "pallas_gpu*")
def test_rows_are_copies_of_their_tokens(backend, rng, shape, capacity, dtype):
    x = (10 * normal(rng, shape[0], shape[3])).astype(dtype)
    plan = random_plan(rng, *shape[:3], capacity)
    rows = jitted(dispatch, backend=backend)(x, plan)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(np.asarray(rows), gathered(np.asarray(x), plan))


@pytest.mark.parametrize("scaling", ["1x128", "per_row"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.quick("*-float8_e4m3fn-1x128")
def test_scales_travel_with_their_rows(backend, rng, dtype, scaling):
    x = quantize(normal(rng, 64, 256), dtype, scaling=scaling)
    plan = random_plan(rng, 64, 4, 8, capacity=20)
    rows = jitted(dispatch, backend=backend)(x, plan)
    assert isinstance(rows, QTensor)
    np.testing.assert_array_equal(np.asarray(rows.values), gathered(np.asarray(x.values), plan))
    np.testing.assert_array_equal(np.asarray(rows.scale), gathered(np.asarray(x.scale), plan))
    assert not np.asarray(dequantize(rows))[np.asarray(plan.order) < 0].any()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("shape", [(37, 3, 5, 1152), (64, 4, 8, 256)], ids=str)
@pytest.mark.quick("xla-*-int8", "pallas_gpu-*-float8_e4m3fn", "pallas_tpu-(64*-float8_e5m2")
def test_rows_are_rounded_on_the_way(backend, rng, shape, dtype):
    x = normal(rng, shape[0], shape[3], dtype="bfloat16")
    plan = random_plan(rng, *shape[:3], capacity=7)
    rows = jitted(dispatch, backend=backend)(ToRound(x, dtype), plan)
    assert same_bits(rows, jitted(dispatch, backend="xla")(quantize(x, dtype, scaling="1x128"), plan))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("shape", [(37, 3, 5, 1152), (64, 8, 20, 256), (600, 2, 4, 1024)], ids=str)
@pytest.mark.quick("xla-*-float8_e4m3fn", "pallas_gpu-*-float8_e4m3fn", "pallas_tpu-(37*-float8_e4m3fn")
def test_planned_and_rounded_on_the_way(backend, rng, shape, dtype):
    """Few tokens and many: as one after the other."""
    num_tokens, top_k, num_groups, columns = shape
    x = normal(rng, num_tokens, columns, dtype="bfloat16")
    ids = jnp.asarray(rng.integers(-1, num_groups + 1, (num_tokens, top_k)), jnp.uint32)
    plan, rows = jax.jit(lambda x: plan_and_dispatch(ToRound(x, dtype), ids, num_groups, backend=backend))(x)
    right = make_plan(ids, num_groups, backend="xla")
    assert same_bits(plan, right)
    assert same_bits(rows, jitted(dispatch, backend="xla")(quantize(x, dtype, scaling="1x128"), right))


def test_errors_of_planning_and_dispatching():
    x = ToRound(jnp.zeros((3, 128)), "float8_e4m3fn")
    with raises_saying(ValueError, "x must be", "T = 4 tokens of topk_ids", "[3, 128]"):
        plan_and_dispatch(x, jnp.zeros((4, 2), jnp.int32), 3)
    with raises_saying(ValueError, "topk_ids must be an integer array", "float32[3, 2]"):
        plan_and_dispatch(x, jnp.zeros((3, 2)), 3)
    with raises_saying(ValueError, "num_groups must be at least 1, got 0"):
        plan_and_dispatch(x, jnp.zeros((3, 2), jnp.int32), 0)


def test_no_gradient_passes_what_is_rounded_on_the_way(rng):
    plan = random_plan(rng, 37, 3, 5)
    ids = plan.inverse % 5

    def both(x):
        x = ToRound(x, "float8_e4m3fn")
        return dispatch(x, plan).scale.sum() + plan_and_dispatch(x, ids, 5)[1].scale.sum()

    assert not np.asarray(jax.grad(both)(normal(rng, 37, 128))).any()


def test_an_id_of_64_bits_is_no_other_group():
    with jax.enable_x64(True):
        ids = jnp.asarray([[0], [2**32 + 1]], jnp.int64)
        plan, _ = plan_and_dispatch(ToRound(jnp.ones((2, 128), jnp.float32), "float8_e4m3fn"), ids, 4)
    assert plan.inverse.tolist() == [[0], [-1]]


def test_tokens_without_a_row_are_never_data(backend, rng):
    x = normal(rng, 37, 19)
    plan = random_plan(rng, 37, 3, 5, capacity=7)
    homeless = (np.asarray(plan.inverse) < 0).all(1)
    rows = jitted(dispatch, backend=backend)(jnp.where(homeless[:, None], jnp.nan, x), plan)
    np.testing.assert_array_equal(rows, gathered(np.asarray(x), plan))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.quick("*-(37, 3, 5, 19)-float32")
def test_combine_undoes_dispatch(backend, rng, shape, dtype):
    x = normal(rng, shape[0], shape[3], dtype=dtype)
    plan = random_plan(rng, shape[0], 1, shape[2], out_of_range=0)
    back = combine(dispatch(x, plan, backend=backend), plan, backend=backend)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)  # by value: a sum that begins at 0 turns −0 into 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.quick("*-7-bfloat16")
def test_gradient_sums_the_rows_of_each_token(backend, rng, capacity, dtype):
    x = normal(rng, 37, 19, dtype=dtype)
    plan = random_plan(rng, 37, 3, 5, capacity)
    drows = normal(rng, plan.order.shape[0], 19, dtype=dtype)
    drows = jnp.where((plan.order < 0)[:, None], jnp.nan, drows)  # must not reach any token

    @jax.jit
    def pull(x, plan, drows):
        return jax.vjp(lambda x: dispatch(x, plan, backend=backend), x)[1](drows)[0]

    dx = pull(x, plan, drows)
    assert dx.dtype == dtype
    expected = np.zeros((37, 19))
    for row, assignment in enumerate(np.asarray(plan.order)):
        if assignment >= 0:
            expected[assignment // 3] += float64(drows)[row]
    assert relative_error(dx, expected) < LIMIT[dtype]


@pytest.mark.quick("xla")
def test_no_gradient_reaches_a_qtensor(backend, rng):
    plan = random_plan(rng, 16, 2, 4)
    values = quantize(normal(rng, 16, 128), "int8", scaling="per_row").values

    def loss(scale):
        return dequantize(dispatch(QTensor(values, scale), plan, backend=backend)).sum()

    assert not np.asarray(jax.grad(loss)(jnp.ones((16, 1)))).any()


def test_checkpoint(backend, rng):
    x, plan = normal(rng, 37, 19), random_plan(rng, 37, 3, 5)

    def loss(x):
        return (dispatch(x, plan, backend=backend) ** 2).sum()

    if is_interpreted(backend):
        assert "tpu_custom_call" in lower_for_tpu(jax.grad(jax.checkpoint(loss)), x).as_text()
        return
    assert same_bits(jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(jax.checkpoint(loss)))(x))


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.quick("pallas_tpu-None", "xla-3", "pallas_gpu*")
def test_no_tokens(backend, capacity):
    plan = planned(jnp.zeros((0, 2), jnp.int32), 2, capacity=capacity)
    x = jnp.zeros((0, 8))
    rows, pullback = jax.vjp(lambda x: dispatch(x, plan, backend=backend), x)
    assert same_bits(rows, jnp.zeros((0 if capacity is None else 6, 8)))
    assert pullback(rows)[0].shape == (0, 8)
    q = quantize(jnp.zeros((0, 128)), scaling="1x128")
    assert not np.asarray(dequantize(dispatch(q, plan, backend=backend))).any()


@pytest.mark.quick("xla", "pallas_gpu")
def test_same_inputs_same_bits(backend, rng):
    x, plan = normal(rng, 37, 19), random_plan(rng, 37, 3, 5)
    function = jitted(dispatch, backend=backend)
    assert same_bits(function(x, plan), function(x, plan))


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (jnp.ones((4, 8)), ["x", "[T, H]", "T = 3", "[4, 8]"]),
        (jnp.ones(3), ["x", "[T, H]", "[3]"]),
        (QTensor(jnp.ones((3, 8), jnp.int8), jnp.ones((1, 1))), ["x", "[1, 1] for 3 rows", "'1x128' or 'per_row'"]),
        (QTensor(jnp.ones((3, 8), jnp.int8), jnp.ones((3, 3))), ["x", "scale [3, 3]", "values [3, 8]"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(x, parts):
    with raises_saying(ValueError, *parts):
        dispatch(x, planned(jnp.zeros((3, 1), int), 1))

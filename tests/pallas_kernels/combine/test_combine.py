import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.combine import combine
from pallas_kernels.plan import Plan, make_plan
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.kernels_tpu import is_interpreted, lower_for_tpu
from tests.pallas_kernels.plan.plans import jitted, planned

backend = every_backend("combine")

T, K, G, H = 37, 3, 5, 19
CAPACITIES = [None, 7]


def problem(rng, capacity=None, shape=(T, K, G, H), dtype=jnp.float32):
    """rows, plan, weights; every row without an assignment is NaN."""
    num_tokens, top_k, num_groups, hidden = shape
    ids = rng.integers(-1, num_groups + 1, (num_tokens, top_k))
    plan = planned(jnp.asarray(ids, jnp.int32), num_groups, capacity=capacity)
    rows = normal(rng, plan.order.shape[0], hidden, dtype=dtype)
    rows = jnp.where((plan.order < 0)[:, None], jnp.nan, rows)
    return rows, plan, jnp.asarray(rng.uniform(0, 1, ids.shape), jnp.float32)


def each_assignment(plan):
    """(token, choice, row) of every assignment that has a row."""
    for (t, k), row in np.ndenumerate(np.asarray(plan.inverse)):
        if row >= 0:
            yield t, k, row


def summed(rows, plan, weights) -> np.ndarray:
    out = np.zeros((plan.inverse.shape[0], rows.shape[1]))
    for t, k, row in each_assignment(plan):
        out[t] += float64(weights)[t, k] * float64(rows)[row]
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("shape", [(T, K, G, H), (64, 8, 32, 256)], ids=str)
@pytest.mark.quick("*-(37, 3, 5, 19)-None-bfloat16")
def test_weighted_sums(backend, rng, shape, capacity, dtype):
    rows, plan, weights = problem(rng, capacity, shape, dtype)
    out = jitted(combine, backend=backend)(rows, plan, weights)
    assert out.dtype == dtype
    assert relative_error(out, summed(rows, plan, weights)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.quick("xla-bfloat16")
def test_narrow_weights(backend, rng, dtype):
    rows, plan, weights = problem(rng)
    weights = weights.astype(dtype)
    out = jitted(combine, backend=backend)(rows, plan, weights)
    assert relative_error(out, summed(rows, plan, weights)) < LIMIT["float32"]


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.quick("*-7")
def test_without_weights_sums_in_the_order_of_the_choices(backend, rng, capacity):
    rows, plan, _ = problem(rng, capacity)
    out = jitted(combine, backend=backend)(rows, plan)
    expected = np.zeros((T, H), np.float32)
    for t, _, row in each_assignment(plan):
        expected[t] += np.asarray(rows)[row]
    np.testing.assert_array_equal(out, expected)


def test_a_token_without_rows_is_zero(backend, rng):
    plan = planned(jnp.array([[0, 1], [-1, 7], [1, 1]]), 2)
    out = combine(normal(rng, 6, 4), plan, jnp.ones((3, 2)), backend=backend)
    assert not np.asarray(out[1]).any()
    assert np.asarray(out[0]).all()


@pytest.mark.parametrize("weight", [np.nan, np.inf, 1e38])
@pytest.mark.quick("*-nan", "xla-*")
def test_the_weight_of_a_missing_row_has_no_effect(backend, rng, weight):
    rows, plan, weights = problem(rng, capacity=7)
    missing = np.asarray(plan.inverse) < 0
    assert missing.any()
    out = jitted(combine, backend=backend)(rows, plan, jnp.where(missing, weight, weights))
    assert same_bits(out, jitted(combine, backend=backend)(rows, plan, weights))


def test_a_fault_in_a_row_stays_in_its_token(backend, rng):
    rows, plan, weights = problem(rng)
    t, _, row = next(each_assignment(plan))
    out = jitted(combine, backend=backend)(rows.at[row, 0].set(jnp.nan), plan, weights)
    faulty = np.zeros((T, H), bool)
    faulty[t, 0] = True
    np.testing.assert_array_equal(np.isnan(out), faulty)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.quick("*-7-bfloat16")
def test_gradients(backend, rng, capacity, dtype):
    rows, plan, weights = problem(rng, capacity, dtype=dtype)
    dout = normal(rng, T, H, dtype=dtype)

    @jax.jit
    def pull(rows, plan, weights, dout):
        return jax.vjp(lambda rows, weights: combine(rows, plan, weights, backend=backend), rows, weights)[1](dout)

    drows, dweights = pull(rows, plan, weights, dout)
    assert (drows.dtype, dweights.dtype) == (dtype, jnp.float32)
    expected_drows, expected_dweights = np.zeros(rows.shape), np.zeros(weights.shape)
    for t, k, row in each_assignment(plan):
        expected_drows[row] = float64(weights)[t, k] * float64(dout)[t]
        expected_dweights[t, k] = float64(rows)[row] @ float64(dout)[t]
    assert relative_error(drows, expected_drows) < LIMIT[dtype]
    assert relative_error(dweights, expected_dweights) < LIMIT["float32"]
    assert not np.asarray(drows)[np.asarray(plan.order) < 0].any()
    assert not np.asarray(dweights)[np.asarray(plan.inverse) < 0].any()


@pytest.mark.parametrize(
    ("dtype", "of_residual"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32",) * 2]
)
@pytest.mark.quick("*-bfloat16-float32", "xla-*")
def test_a_sum_onto_a_residual_is_rounded_once(backend, rng, dtype, of_residual):
    rows, plan, weights = problem(rng, 7, dtype=dtype)
    residual = 100 * normal(rng, T, H, dtype=of_residual)
    out = jitted(combine, backend=backend)(rows, plan, weights, residual=residual)
    assert out.dtype == dtype
    right = float64(residual) + summed(rows, plan, weights)
    assert relative_error(out, right) < LIMIT[dtype]
    alone = np.asarray(plan.inverse < 0).all(1)
    assert alone.any()
    np.testing.assert_array_equal(out[alone], residual[alone].astype(dtype))


def test_a_sum_is_not_rounded_before_the_residual(backend):
    """1 + 2⁻⁸ is halfway between two numbers of BF16; with 2⁻⁸ more it is one."""
    rows = jnp.full((2, 128), 1, jnp.bfloat16).at[1].set(2**-8)
    plan = make_plan(jnp.array([[0, 1]], jnp.int32), 2)
    out = combine(rows, plan, jnp.ones((1, 2)), residual=jnp.full((1, 128), 2**-8, jnp.bfloat16), backend=backend)
    np.testing.assert_array_equal(out, jnp.full_like(out, 1 + 2**-7))


@pytest.mark.quick("xla")
def test_gradients_of_a_sum_onto_a_residual(backend, rng):
    rows, plan, weights = problem(rng, 7)
    residual, dout = normal(rng, T, H), normal(rng, T, H)

    def onto(rows, weights, residual):
        return combine(rows, plan, weights, residual=residual, backend=backend)

    of_sum = jax.vjp(lambda rows, weights: combine(rows, plan, weights, backend=backend), rows, weights)[1](dout)
    drows, dweights, dresidual = jax.vjp(onto, rows, weights, residual)[1](dout)
    assert same_bits(drows, of_sum[0])
    assert same_bits(dweights, of_sum[1])
    assert same_bits(dresidual, dout)
    tangents = normal(rng, *rows.shape), normal(rng, *weights.shape), normal(rng, T, H)
    _, dy = jax.jvp(onto, (rows, weights, residual), tangents)
    assert (
        relative_error(
            (float64(dy) * dout).sum(),
            sum((float64(a) * b).sum() for a, b in zip(tangents, (drows, dweights, dresidual), strict=True)),
        )
        < 1e-4
    )


@pytest.mark.quick("xla")
def test_gradient_of_the_weights_has_their_dtype(backend, rng):
    rows, plan, weights = problem(rng)

    def loss(weights):
        return combine(rows, plan, weights, backend=backend).sum()

    assert jax.grad(loss)(weights.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.quick("xla")
def test_gradient_without_weights(backend, rng):
    rows, plan, _ = problem(rng, capacity=7)
    drows = jax.grad(lambda rows: combine(rows, plan, backend=backend).sum())(rows)
    np.testing.assert_array_equal(drows, np.repeat(np.asarray(plan.order)[:, None] >= 0, H, 1))


def test_checkpoint(backend, rng):
    rows, plan, weights = problem(rng)

    def loss(rows, weights):
        return (combine(rows, plan, weights, backend=backend) ** 2).sum()

    if is_interpreted(backend):
        lowered = lower_for_tpu(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), rows, weights)
        assert "tpu_custom_call" in lowered.as_text()
        return
    plain = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, weights)
    recomputed = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(rows, weights)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(recomputed, plain, strict=True))


@pytest.mark.parametrize("capacity", [None, 3])
def test_no_tokens(backend, capacity):
    plan = planned(jnp.zeros((0, 2), jnp.int32), 2, capacity=capacity)
    rows = jnp.ones((plan.order.shape[0], 8))
    out, pullback = jax.vjp(lambda *x: combine(x[0], plan, x[1], backend=backend), rows, jnp.zeros((0, 2)))
    assert out.shape == (0, 8)
    drows, dweights = pullback(out)
    assert same_bits(drows, jnp.zeros_like(rows))
    assert dweights.shape == (0, 2)


def test_no_rows_leave_the_residual(backend, rng):
    nothing = jnp.zeros(0, jnp.int32)
    plan = Plan(nothing, jnp.full((3, 2), -1), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32), jnp.int32(0))
    rows, residual = jnp.zeros((0, 128)), normal(rng, 3, 128)
    assert same_bits(combine(rows, plan, residual=residual, backend=backend), residual)
    assert not np.asarray(combine(rows, plan, backend=backend)).any()


@pytest.mark.quick("pallas_tpu", "pallas_gpu")
def test_same_inputs_same_bits(backend, rng):
    rows, plan, weights = problem(rng, capacity=7, dtype=jnp.bfloat16)
    function = jitted(combine, backend=backend)
    assert same_bits(function(rows, plan, weights), function(rows, plan, weights))


def test_a_residual_that_does_not_fit_is_refused():
    plan = planned(jnp.zeros((3, 2), int), 1)
    for residual in (
        jnp.ones((3, 4)),
        jnp.ones((2, 8)),
        jnp.ones((3, 8), jnp.int32),
        jnp.ones((3, 8), "float8_e4m3fn"),
    ):
        with raises_saying(ValueError, "residual", "[T, H] = [3, 8]", f"{residual.dtype}{list(residual.shape)}"):
            combine(jnp.ones((6, 8)), plan, residual=residual)


@pytest.mark.parametrize(
    ("rows", "weights", "parts"),
    [
        (jnp.ones((5, 8)), None, ["rows", "[R, H]", "R = 6", "[5, 8]"]),
        (jnp.ones(6), None, ["rows", "[R, H]", "[6]"]),
        (jnp.ones((6, 8), jnp.float8_e4m3fn), None, ["rows", "BF16, FP16 or float32", "float8_e4m3fn"]),
        (jnp.ones((6, 8), jnp.int32), None, ["rows", "BF16, FP16 or float32", "int32"]),
        (jnp.ones((6, 8)), jnp.ones((2, 3)), ["weights", "[T, K] = [3, 2]", "[2, 3]"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(rows, weights, parts):
    with raises_saying(ValueError, *parts):
        combine(rows, planned(jnp.zeros((3, 2), int), 1), weights)

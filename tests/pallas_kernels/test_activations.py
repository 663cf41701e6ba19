import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import check_activation, gated, gated_halves
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.pallas_kernels.grouped_matmul import grouped

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"]
LIMITS = [None, 0.7, 7.0]

jitted = jax.jit(gated, static_argnums=(2, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.quick(
    "gelu-None-float32", "gelu_tanh-None-bfloat16", "relu2-None-bfloat16", "silu-0.7-float32", "swigluoai-7.0-float32"
)
def test_equals_its_formula(rng, activation, limit, dtype):
    gate, up = 4 * normal(rng, 2, 40, 30, dtype=dtype)
    out = jitted(gate, up, activation, limit)
    assert out.dtype == dtype
    # In BF16 each step of the formula rounds.
    bound = LIMIT[dtype] if dtype == "float32" else 2e-2
    assert relative_error(out, grouped.gated(float64(gate), float64(up), activation, limit)) < bound


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(rng, activation, limit):
    h, dout = 4 * normal(rng, 40, 60), normal(rng, 40, 30)
    pull = jax.jit(lambda h, dout: jax.vjp(lambda h: gated_halves(h, activation, limit), h)[1](dout)[0])
    reference = grouped.gated_gradient(float64(h), float64(dout), activation, limit)
    assert relative_error(pull(h, dout), reference) < LIMIT["float32"]


def test_gate_comes_first():
    h = jnp.array([[100.0, 50.0, 2.0, 3.0]])
    np.testing.assert_allclose(gated_halves(h, "silu"), [[200.0, 150.0]])
    np.testing.assert_allclose(gated_halves(h, "swigluoai"), [[300.0, 200.0]])
    np.testing.assert_allclose(gated_halves(h, "relu2"), [[20000.0, 7500.0]])


def test_relu2_is_flat_up_to_zero():
    """Also where the gate is minus infinity, which a product with 0 would turn into NaN."""
    gate = jnp.array([-jnp.inf, -3.0, -0.0, 0.0, 2.0])
    value, pull = jax.vjp(lambda gate: jitted(gate, jnp.full(5, 5.0), "relu2", None), gate)
    assert value.tolist() == [0, 0, 0, 0, 20]
    assert pull(jnp.ones(5))[0].tolist() == [0, 0, 0, 0, 20]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limit_clamps_gate_from_above_and_up_on_both_sides(activation):
    gate, up = jnp.array([9.0, -9.0, 9.0, 1.0]), jnp.array([9.0, 9.0, -9.0, -1.0])
    clamped = jnp.array([7.0, -9.0, 7.0, 1.0]), jnp.array([7.0, 7.0, -7.0, -1.0])
    np.testing.assert_array_equal(jitted(gate, up, activation, 7.0), jitted(*clamped, activation, None))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation, limit):
    gate, up = jnp.array([1e4, -1e4, 0.0, jnp.nan, 1.0]), jnp.array([2.0, 2.0, 2.0, 2.0, jnp.nan])
    out = np.asarray(jitted(gate, up, activation, limit))
    assert np.isfinite(out[:3]).all()
    assert (out[1:3] == 0).all()
    assert np.isnan(out[3:]).all()


@pytest.mark.parametrize(
    ("activation", "limit", "parts"),
    [
        ("relu", None, ["activation", "'relu'", "silu, gelu, gelu_tanh, swigluoai, relu2"]),
        ("silu", 0, ["activation_limit", "positive", "got 0"]),
        ("silu", -7.0, ["activation_limit", "positive", "got -7.0"]),
        ("silu", float("nan"), ["activation_limit", "positive", "got nan"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(activation, limit, parts):
    with raises_saying(ValueError, *parts):
        check_activation(activation, limit)

"""Rows taken from all chips, on meshes of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.ring import take_over_ring
from tests.helpers import relative_error, same_bits


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("spec", [P("a"), P(("a", "b"), "c"), P(None, "a"), P(("b", "a"))], ids=str)
@pytest.mark.quick("*'c'*-float8_e4m3fn-AxisType.Explicit", "*'a'*-float32-AxisType.Auto")
def test_rows_of_all_chips(spec, dtype, axis_type, rng):
    mesh = jax.make_mesh((2, 3, 2), ("a", "b", "c"), (axis_type,) * 3, devices=jax.devices()[:12])
    values = rng.standard_normal((18, 4)).astype(dtype)
    sharding = NamedSharding(mesh, spec)
    x = jax.device_put(values, sharding)
    rows = rng.integers(0, 18, 24).astype(np.int32)
    with jax.set_mesh(mesh):
        taken = take_over_ring(x, jnp.asarray(rows), sharding)
    assert taken.sharding.is_equivalent_to(sharding, 2)
    assert same_bits(np.asarray(taken), values[rows])


def test_its_gradient_adds_up(rng):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), (AxisType.Auto,) * 2, devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, P("expert"))
    x = jax.device_put(rng.standard_normal((8, 3)).astype(np.float32), sharding)
    rows, weights = jnp.array([0, 0, 7, 3, 0, 5, 1, 2]), rng.standard_normal((8, 3)).astype(np.float32)
    got = jax.grad(lambda x: (take_over_ring(x, rows, sharding) * weights).sum())(x)
    expected = jax.grad(lambda x: (x[rows] * weights).sum())(jnp.asarray(np.asarray(x)))
    assert relative_error(got, expected) < 1e-6


def test_no_chip_ever_holds_all_rows(rng):
    mesh = jax.make_mesh((8,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, P("expert"))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=sharding)
    rows = jax.ShapeDtypeStruct((72,), jnp.int32)
    compiled = jax.jit(lambda x, rows: take_over_ring(x, rows, sharding)).lower(x, rows).compile()
    text = compiled.as_text()
    assert "all-gather(" not in text
    assert "f32[64,256]" not in text


def test_slots_that_chips_cannot_share():
    mesh = jax.make_mesh((4,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P("expert"))
    with pytest.raises(ValueError, match="the 4 chips that share the slots cannot share 6 of them evenly"):
        take_over_ring(jax.device_put(jnp.ones((4, 2)), sharding), jnp.arange(6) % 4, sharding)

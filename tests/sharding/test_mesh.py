"""Meshes: making them, asking for their axes, and laying arrays out in them."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.mesh import (
    axis_size,
    current_mesh,
    has_explicit_axes,
    make_mesh,
    place,
    sharding_in,
    tokens_spec,
    with_auto_axes,
)

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@AXIS_TYPES
def test_make_mesh(axis_type):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    assert dict(mesh.shape) == {"data": 2, "expert": 4}
    assert mesh.axis_types == (axis_type, axis_type)
    assert set(mesh.devices.flat) == set(jax.devices()[:8])


def test_make_mesh_of_chosen_devices():
    devices = jax.devices()[4:12]
    mesh = make_mesh(ep=4, devices=devices)
    assert set(mesh.devices.flat) == set(devices[:4])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ep": 0}, "ep and dp must be at least 1, got ep=0, dp=1"),
        ({"ep": 4, "dp": 0}, "ep and dp must be at least 1, got ep=4, dp=0"),
        ({"ep": -2}, "ep and dp must be at least 1, got ep=-2, dp=1"),
        ({"ep": 16, "dp": 3}, "a mesh of dp=3 x ep=16 needs 48 devices, 32 are at hand (cpu)"),
        ({"ep": 64}, "jax.config.update('jax_num_cpu_devices', 64)"),
        ({"ep": 1, "devices": []}, "a mesh of dp=1 x ep=1 needs 1 devices, 0 are at hand"),
    ],
    ids=str,
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(**sizes)


def test_axis_size():
    mesh = make_mesh(ep=4, dp=2)
    for either in (mesh, mesh.abstract_mesh):
        assert (axis_size(either, "data"), axis_size(either, "expert")) == (2, 4)
        message = (
            "the mesh has no axis 'model', only ('data', 'expert'); make it with sharding.mesh.make_mesh(ep, dp), or "
            "name the mesh's own axes (expert_axis=..., token_axes=...)"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            axis_size(either, "model")


def test_current_mesh():
    mesh = make_mesh(ep=4, dp=2)
    assert current_mesh() is None
    with jax.set_mesh(mesh):
        assert current_mesh() == mesh
        assert isinstance(current_mesh(), Mesh)
        while_tracing = []
        jax.jit(lambda x: while_tracing.append(current_mesh()) or x)(1.0)
        assert isinstance(while_tracing[0], AbstractMesh)
        assert while_tracing[0].shape == mesh.shape
    assert current_mesh() is None


def in_force(mesh, wanted: bool):
    return jax.set_mesh(mesh) if wanted else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("axis_type", "jitted", "with_set_mesh"),
    # Without jax.set_mesh, JAX refuses a jit that brings arrays into an Explicit mesh.
    [
        pytest.param(AxisType.Auto, False, False, id="auto-eager"),
        pytest.param(AxisType.Auto, False, True, id="auto-eager-set_mesh"),
        pytest.param(AxisType.Auto, True, False, id="auto-jit"),
        pytest.param(AxisType.Auto, True, True, id="auto-jit-set_mesh"),
        pytest.param(AxisType.Explicit, False, False, id="explicit-eager"),
        pytest.param(AxisType.Explicit, False, True, id="explicit-eager-set_mesh"),
        pytest.param(AxisType.Explicit, True, True, id="explicit-jit-set_mesh"),
    ],
)
@pytest.mark.parametrize("spec", [tokens_spec(("data", "expert")), PartitionSpec("expert"), PartitionSpec()], ids=str)
def test_place(spec, axis_type, jitted, with_set_mesh, rng):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    tree = {"a": rng.standard_normal((8, 3)), "b": (rng.integers(9, size=(16, 2)), None)}
    tree = jax.tree.map(jnp.asarray, tree)

    def lay_out(tree):
        return place(tree, mesh, spec)

    with in_force(mesh, with_set_mesh):
        placed = (jax.jit(lay_out) if jitted else lay_out)(tree)
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(after, before)
        assert after.sharding.is_equivalent_to(NamedSharding(mesh, spec), after.ndim)


@AXIS_TYPES
def test_place_keeps_gradients(axis_type, rng):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    x = jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda x: (place(x, mesh, tokens_spec(("data", "expert"))) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


def test_tokens_lie_over_all_devices():
    mesh = make_mesh(ep=4, dp=2)
    tokens = jax.device_put(np.arange(16), NamedSharding(mesh, tokens_spec(("data", "expert"))))
    by_device = {shard.device: shard.data.tolist() for shard in tokens.addressable_shards}
    assert [by_device[device] for device in mesh.devices.flat] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_has_explicit_axes():
    assert not has_explicit_axes(make_mesh(2))
    assert has_explicit_axes(make_mesh(2, axis_type=AxisType.Explicit))
    mixed = jax.make_mesh((2, 2), ("data", "expert"), (AxisType.Auto, AxisType.Explicit), devices=jax.devices()[:4])
    assert has_explicit_axes(mixed)


@AXIS_TYPES
def test_with_auto_axes(axis_type):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    assert with_auto_axes(mesh) == make_mesh(ep=4, dp=2)
    assert with_auto_axes(mesh.abstract_mesh).axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_sharding_in(jitted):
    mesh = make_mesh(ep=4, dp=2, axis_type=AxisType.Explicit)
    split = jax.device_put(jnp.zeros((8, 4)), NamedSharding(mesh, PartitionSpec(None, "expert")))
    found = []

    def look(x):
        found.append(sharding_in(x, mesh))
        return x

    for x in (split, jnp.zeros((8, 4))):
        (jax.jit(look) if jitted else look)(x)
    assert [sharding.is_equivalent_to(split.sharding, 2) for sharding in found] == [True, False]
    assert found[1].is_fully_replicated
    assert all(sharding.mesh == mesh for sharding in found)

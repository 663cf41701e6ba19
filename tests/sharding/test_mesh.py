"""Meshes: making them, asking for their axes, and laying arrays out in them."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.mesh import (
    current_mesh,
    free_axes,
    has_explicit_axes,
    is_split_here,
    make_mesh,
    mesh_here,
    place,
    spec_in,
)
from tests.sharding.shard_maps import inside

BY_TOKEN = PartitionSpec(("data", "expert"))
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
        ({"ep": 0}, "ep and dp must be whole numbers of at least 1, got ep=0, dp=1"),
        ({"ep": 4, "dp": 0}, "ep and dp must be whole numbers of at least 1, got ep=4, dp=0"),
        ({"ep": 2.0}, "ep and dp must be whole numbers of at least 1, got ep=2.0, dp=1"),
        ({"ep": -2}, "ep and dp must be whole numbers of at least 1, got ep=-2, dp=1"),
        ({"ep": 16, "dp": 3}, "a mesh of dp=3 x ep=16 needs 48 devices, 32 are at hand (cpu)"),
        ({"ep": 64}, "jax.config.update('jax_num_cpu_devices', 64)"),
        ({"ep": 1, "devices": []}, "a mesh of dp=1 x ep=1 needs 1 devices, 0 are at hand"),
    ],
    ids=str,
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(**sizes)


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


@AXIS_TYPES
def test_inside_a_shard_map_the_mesh_is_what_that_leaves(axis_type):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    for look in (current_mesh, lambda: mesh_here(None), lambda: mesh_here(mesh)):
        left = inside(["data"], mesh, look)
        assert dict(left.shape) == {"data": 2, "expert": 4}
        assert free_axes(left) == ("expert",)
        assert inside(["data", "expert"], mesh, look) is None
    assert free_axes(mesh) == ("data", "expert")


def test_another_mesh_than_that_of_the_shard_map_around():
    message = (
        "mesh has the axes {'data': 1, 'expert': 8}, and that of the jax.shard_map around has {'data': 2, 'expert': 4}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        inside(["data"], make_mesh(ep=4, dp=2), lambda: mesh_here(make_mesh(8)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inside_pmap_there_is_no_mesh():
    found = []
    jax.pmap(lambda x: found.append((current_mesh(), mesh_here(None))) or x)(jnp.zeros(2))
    assert found[0] == (None, None)


def test_mesh_here_outside_of_shard_map():
    mesh, other = make_mesh(ep=4, dp=2), make_mesh(8)
    assert mesh_here(None) is None
    assert mesh_here(mesh) == mesh
    with jax.set_mesh(mesh):
        assert mesh_here(None) == mesh_here(mesh) == mesh
        with pytest.raises(ValueError, match=re.escape("that of the jax.set_mesh around has {'data': 2, 'expert': 4}")):
            mesh_here(other)
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, such as make_mesh\(ep=4\), got int"):
        mesh_here(4)


def in_force(mesh, wanted: bool):
    return jax.set_mesh(mesh) if wanted else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("axis_type", "jitted", "with_set_mesh"),
    # Without jax.set_mesh, JAX refuses a jit that brings arrays into an Explicit mesh.
    [
        pytest.param(AxisType.Auto, False, False, id="auto-eager"),
        pytest.param(AxisType.Auto, False, True, id="auto-eager-set_mesh"),
        pytest.param(AxisType.Explicit, False, False, id="explicit-eager"),
        pytest.param(AxisType.Explicit, False, True, id="explicit-eager-set_mesh"),
        pytest.param(AxisType.Explicit, True, True, id="explicit-jit-set_mesh"),
    ],
)
@pytest.mark.parametrize("spec", [BY_TOKEN, PartitionSpec("expert"), PartitionSpec()], ids=str)
def test_place(spec, axis_type, jitted, with_set_mesh, rng):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    tree = {"a": rng.standard_normal((8, 3)), "b": (rng.integers(9, size=(16, 2)), None)}
    tree = jax.tree.map(jnp.asarray, tree)

    def lay_out(tree):
        return place(tree, mesh, jax.tree.map(lambda _: spec, tree))

    with in_force(mesh, with_set_mesh):
        placed = (jax.jit(lay_out) if jitted else lay_out)(tree)
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(after, before)
        assert after.sharding.is_equivalent_to(NamedSharding(mesh, spec), after.ndim)


def test_each_array_has_a_spec_of_its_own():
    mesh = make_mesh(ep=4, dp=2)
    specs = {"a": PartitionSpec("expert"), "b": (PartitionSpec(None, "data"), None)}
    placed = place({"a": jnp.zeros(8), "b": (jnp.zeros((3, 4)), None)}, mesh, specs)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, placed) == specs


def test_place_leaves_it_to_the_compiler_while_tracing_over_auto_axes():
    mesh, seen = make_mesh(ep=4, dp=2), []

    def look(x):
        seen.append(place(x, mesh, BY_TOKEN) is x)
        return x

    jax.jit(look)(jnp.zeros(8))
    assert seen == [True]


@AXIS_TYPES
def test_place_keeps_gradients(axis_type, rng):
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    x = jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda x: (place(x, mesh, BY_TOKEN) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


def test_tokens_lie_over_all_devices():
    mesh = make_mesh(ep=4, dp=2)
    tokens = jax.device_put(np.arange(16), NamedSharding(mesh, BY_TOKEN))
    by_device = {shard.device: shard.data.tolist() for shard in tokens.addressable_shards}
    assert [by_device[device] for device in mesh.devices.flat] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_has_explicit_axes():
    assert not has_explicit_axes(make_mesh(2))
    assert has_explicit_axes(make_mesh(2, axis_type=AxisType.Explicit))
    mixed = jax.make_mesh((2, 2), ("data", "expert"), (AxisType.Auto, AxisType.Explicit), devices=jax.devices()[:4])
    assert has_explicit_axes(mixed)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@AXIS_TYPES
def test_spec_in(axis_type, jitted):
    """Types say how arrays lie in a mesh of Explicit axes; else only arrays that are known do."""
    mesh = make_mesh(ep=4, dp=2, axis_type=axis_type)
    split = jax.device_put(jnp.zeros((8, 4)), NamedSharding(mesh, PartitionSpec(None, "expert")))
    elsewhere = jax.device_put(split, NamedSharding(make_mesh(8), PartitionSpec("expert")))
    found = []

    def look(x):
        found.append(spec_in(x, mesh))
        return x

    with jax.set_mesh(mesh):
        (jax.jit(look) if jitted else look)(split)
    look(jnp.zeros((8, 4)))
    is_said = axis_type == AxisType.Explicit or not jitted
    assert found[0] == (PartitionSpec(None, "expert") if is_said else None)
    assert found[1] is None
    if axis_type == AxisType.Auto:
        assert spec_in(elsewhere, mesh) is None


def test_spec_in_has_an_entry_for_every_dimension():
    mesh = make_mesh(ep=4, dp=2)
    x = jax.device_put(jnp.zeros((8, 4, 2)), NamedSharding(mesh, PartitionSpec("data")))
    assert spec_in(x, mesh) == PartitionSpec("data", None, None)
    assert spec_in(x, mesh.abstract_mesh) == PartitionSpec("data", None, None)


def test_arrays_are_split_by_the_mesh_in_force_else_by_the_one_made_on():
    one, four = make_mesh(ep=1), make_mesh(ep=4)
    assert [is_split_here(mesh) for mesh in (None, one, four)] == [False, False, True]
    with jax.set_mesh(one):
        assert not is_split_here(four)
    with jax.set_mesh(four):
        assert is_split_here(None)
        seen = []
        jax.shard_map(lambda: seen.append(is_split_here(four)), in_specs=(), out_specs=None)()
    assert seen == [False], "every chip has its own"
    explicit = make_mesh(ep=1, axis_type=AxisType.Explicit)
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(explicit, PartitionSpec("data")))
    jax.eval_shape(lambda x: seen.append(is_split_here(None, None, x)), x)
    assert seen == [False, True], "as its type says"

"""Meshes with FSDP and tensor axes against the dense oracle, and that no chip repeats another's work."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.tpu.libtpu import libtpu_version, run_job
from moejax import MoEConfig, Partition, TopKRouter, dense_moe, moe
from moejax.axes import axes_on
from moejax.params import param_specs
from tests.helpers import normal, relative_error
from tests.moejax.layers import clear_cut_tokens, random_params
from tests.sharding.exchange.exchanges import OTHERS

CHIPS, TOKENS = 8, (4, 16)
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}
MESHES = {
    "data and expert": ({"data": 2, "expert": 4}, None),
    "fsdp, expert and tensor": ({"fsdp": 2, "expert": 2, "tensor": 2}, None),
    "a stage of one chip": ({"stage": 1, "fsdp": 4, "expert": 2, "tensor": 1}, None),
    "foreign names": ({"x": 2, "y": 2, "z": 2}, Partition(expert="z", embed="x", mlp="y", tokens=("x", "y", "z"))),
}
OVER_NODES = {
    "nodes": ({"node": 2, "local": 4}, Partition(expert=("node", "local"))),
    "nodes and tensor": ({"node": 2, "local": 2, "tensor": 2}, Partition(expert=("node", "local"))),
}


def config_of(dtype: str) -> MoEConfig:
    return MoEConfig(
        hidden_size=64,
        intermediate_size=32,
        num_experts=8,
        top_k=2,
        shared_intermediate_size=32,
        router=TopKRouter(router_bias=True),
        expert_bias=True,
        dtype=jnp.dtype(dtype),
    )


def mesh_of(name: str) -> tuple[jax.sharding.Mesh, Partition | None]:
    sizes, partition = (MESHES | OVER_NODES)[name]
    devices = jax.devices()[:CHIPS]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices), partition


@functools.cache
def problem(dtype: str):
    rng = np.random.default_rng(0)
    config = config_of(dtype)
    params = random_params(config, rng)
    x = clear_cut_tokens(math.prod(TOKENS), config, params, rng).reshape(*TOKENS, -1)
    direction = normal(rng, *x.shape)

    def loss(x, params):
        return (dense_moe(x, params, config) * direction).sum()

    return config, params, x, direction, jax.jit(jax.grad(loss, argnums=(0, 1)))(x.astype(jnp.float32), params)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.slow
def test_gradients_equal_the_dense_oracles_and_lie_as_the_parameters(name, dtype):
    config, params, x, direction, expected = problem(dtype)
    mesh, partition = mesh_of(name)
    specs = param_specs(params, config, axes_on(mesh, partition, config))
    params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)

    @jax.jit
    def gradients(x, params):
        def loss(x, params):
            y, _ = moe(x, params, config, mesh=mesh, partition=partition)
            return (y.astype(jnp.float32) * direction).sum()

        return jax.grad(loss, argnums=(0, 1))(x, params)

    got = gradients(x, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < LIMITS[dtype]
    for part, whole in zip(jax.tree.leaves(got[1]), jax.tree.leaves(params), strict=True):
        assert part.sharding.is_equivalent_to(whole.sharding, whole.ndim)


@pytest.mark.usefixtures("own_transports")
@pytest.mark.parametrize("other", [*OTHERS, "hierarchical"])
@pytest.mark.slow
def test_a_layer_over_another_transport(other):
    """Values and gradients, with padding, a capacity, and weights and width that are split."""
    config, params, x, direction, _ = problem("float32")
    config = dataclasses.replace(config, capacity_factor=1.0)
    mesh, partition = mesh_of("nodes and tensor" if other == "hierarchical" else "fsdp, expert and tensor")
    mask = jnp.arange(x.shape[1]) < jnp.array([[16], [9], [0], [12]])

    def results(transport, mesh):
        def loss(x, params):
            own = dataclasses.replace(config, transport=transport)
            y, aux = moe(x, params, own, mesh=mesh, partition=partition, mask=mask)
            return (y * direction).sum(), (y, aux.load)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params)

    got, expected = results(other, mesh), results("auto", None)
    assert expected[1][1].dropped.sum() > 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < LIMITS["float32"]


@pytest.mark.slow
def test_gradients_of_rows_travel_in_8_bits():
    """Of e5m2, with two bits of mantissa; the result is none of them."""
    config, params, x, direction, expected = problem("float32")
    config = dataclasses.replace(config, wire_gradient_dtype="float8_e5m2")
    mesh, _ = mesh_of("data and expert")

    def loss(x, params):
        y, _ = moe(x, params, config, mesh=mesh)
        return (y * direction).sum(), y

    got, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    assert relative_error(y, dense_moe(x, params, config)) < LIMITS["float32"]
    errors = [relative_error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)]
    assert 1e-3 < max(errors) < 0.1


@pytest.mark.parametrize("name", OVER_NODES)
@pytest.mark.slow
def test_a_layer_over_nodes_equals_the_dense_oracle(name):
    """In two hops: values, and gradients for tokens and parameters, those of the router's weights that travel too."""
    config, params, x, direction, expected = problem("float32")
    config = dataclasses.replace(config, transport="hierarchical")
    mesh, partition = mesh_of(name)

    def loss(x, params):
        y, aux = moe(x, params, config, mesh=mesh, partition=partition)
        return (y * direction).sum(), (y, aux.load.dropped)

    got, (y, dropped) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    assert relative_error(y, dense_moe(x, params, config)) < LIMITS["float32"]
    assert not dropped.any()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < LIMITS["float32"]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.quick("fsdp, expert and tensor", "foreign names")
def test_every_chip_works_on_its_share_of_the_tokens(name):
    config, params, x, _, _ = problem("float32")
    mesh, partition = mesh_of(name)
    axes = axes_on(mesh, partition, config)
    jaxpr = jax.make_jaxpr(lambda x, params: moe(x, params, config, mesh=mesh, partition=partition))(x, params)
    own = math.prod(TOKENS) // CHIPS
    routed = [equation.invars[0].aval.shape for equation in equations(jaxpr.jaxpr, "top_k")]
    assert routed == [(own, config.num_experts)]
    # Chips that share the experts' width move the rows of all their tokens, in a part of the columns each.
    (first, *_) = equations(jaxpr.jaxpr, "dispatch")
    (moved,) = [variable.aval.shape for variable in first.invars if jnp.issubdtype(variable.aval.dtype, jnp.floating)]
    assert moved == (axes.tp * own, config.hidden_size // axes.tp)
    (region,) = equations(jaxpr.jaxpr, "shard_map")
    shapes = [variable.aval.shape for variable in region.params["jaxpr"].invars]
    gate_up = (
        config.num_experts // axes.ep,
        config.hidden_size // axes.size(axes.embed),
        2,
        config.intermediate_size // axes.tp,
    )
    assert gate_up in shapes
    assert not any(shape[:1] == (config.num_experts,) and len(shape) > 2 for shape in shapes)


def equations(jaxpr, name: str):
    """The equations of this primitive, in all that `jaxpr` calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            found.append(equation)
        if equation.primitive.name in ("top_k", "dispatch"):
            continue  # what stands in it is how it is made
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += equations(inner, name)
    return found


@pytest.mark.parametrize("spec", [P("data", "expert"), P("data"), P(None, ("data", "expert"))])
@pytest.mark.quick("spec2")
def test_activations_are_taken_as_they_lie(spec):
    """Beside the layer's own exchange nothing moves between chips."""
    config, params, x, _, _ = problem("float32")
    mesh, _ = mesh_of("data and expert")
    partition = Partition(tokens=tuple(names if isinstance(names, tuple) else (names,) for names in spec if names))
    if spec[0] is None:
        partition = Partition(tokens=((), ("data", "expert")))
    if spec == P("data"):
        partition = Partition()  # every chip takes its part of what it holds
    sharded = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    specs = param_specs(params, config, axes_on(mesh, partition, config))
    placed = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, own)), params, specs
    )
    compiled = jax.jit(lambda x, params: moe(x, params, config, mesh=mesh, partition=partition)[0])
    text = compiled.lower(sharded, placed).compile().as_text()
    assert text.count("all-to-all(") <= 3  # which rows come, the rows, and back
    assert "all-gather(" not in text
    assert "collective-permute(" not in text


@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (EXTRAS=aot)")
@pytest.mark.parametrize(("mesh", "hidden_size"), [("fsdp, expert and tensor", 768), ("a stage of one chip", 1024)])
@pytest.mark.slow
def test_on_tpus_weights_are_gathered_in_bfloat16_and_their_gradients_scattered(mesh, hidden_size):
    """With 384 and with 256 columns a chip, of which only the latter fill a TPU's registers in pairs."""
    sizes, _ = MESHES[mesh]
    job = {"topology": "v6e:2x4", "mesh": sizes, "hidden_size": hidden_size}
    found = run_job("tests.moejax.fsdp_gate", job, timeout=500)
    experts = [shape for kind, shape in found["collectives"] if kind == "all-gather" and len(shape) > 6]
    assert experts
    gathers = [shape for kind, shape in found["collectives"] if kind == "all-gather"]
    assert all(shape.startswith(("bf16", "s32")) or shape in found["router"] for shape in gathers), gathers
    scattered = [shape for kind, shape in found["collectives"] if kind == "reduce-scatter" and shape.startswith("bf16")]
    assert len(scattered) >= 4  # gate/up and down of the experts, and of the shared one
    assert not [shape for shape in found["summed"] if shape in found["whole"]]

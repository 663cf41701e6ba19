"""The flax.linen layer: the same parameters and answers as the nnx one."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

import moejax
import moejax.linen
from moejax import MoEConfig, TopKRouter, make_mesh, with_changes
from tests.helpers import LIMIT, normal, relative_error, same_bits

CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    shared_intermediate_size=16,
    router=TopKRouter(scoring="sigmoid", correction_bias=True, z_loss=0.01),
    expert_bias=True,
    dtype=jnp.float32,
)


def init(module: linen.Module, x, seed: int = 0):
    return jax.jit(module.init)(jax.random.key(seed), x)


@pytest.fixture(scope="module")
def x():
    return normal(np.random.default_rng(5), 2, 5, CONFIG.hidden_size)


@pytest.fixture(scope="module")
def variables(x):
    """Made on one chip."""
    return init(moejax.linen.MoE(CONFIG), x)


def as_params(variables) -> moejax.MoEParams:
    """Parameters and router state as the function takes them."""
    params, state = variables["params"], variables["RouterState"]
    return moejax.MoEParams(**{**params, "router": params["router"] | state["router"]})


def test_structure_shapes_and_dtypes_are_those_of_the_nnx_layer(variables):
    layer = moejax.MoE(CONFIG, rngs=nnx.Rngs(0))
    assert set(variables) == {"params", "RouterState"}
    assert jax.tree.map(jnp.shape, variables["RouterState"]) == {"router": {"correction_bias": (8,)}}
    chex.assert_trees_all_equal_shapes_and_dtypes(as_params(variables), layer.params())


def test_values_differ_with_the_key_only(variables, x):
    layer = moejax.linen.MoE(CONFIG)
    assert same_bits(init(layer, x), variables)
    other = init(layer, x, seed=1)
    assert not np.array_equal(other["params"]["gate_up"], variables["params"]["gate_up"])


def test_apply_equals_the_nnx_layer(variables, x):
    layer = moejax.MoE.from_params(as_params(variables), CONFIG)
    expected = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert same_bits(jax.jit(moejax.linen.MoE(CONFIG).apply)(variables, x), expected)


def test_state_that_is_boxed_moves_and_stays_boxed(x):
    """As docs/training.md says: a mesh has linen box parameters."""
    layer = moejax.linen.MoE(CONFIG)
    with jax.set_mesh(make_mesh(ep=4, dp=2)):
        variables = init(layer, x)
        _, aux = jax.jit(layer.apply)(variables, x)
    state = variables["RouterState"]["router"]
    router = linen.unbox(variables["params"]["router"] | state)
    moved = CONFIG.router.update(router, aux.load.tokens_per_expert)
    after = linen.meta.replace_boxed(state, moved)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    load = np.asarray(aux.load.tokens_per_expert, np.float64)
    expected = CONFIG.router.update_rate * np.sign(load.mean() - load)
    np.testing.assert_allclose(linen.unbox(after)["correction_bias"], expected, rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.slow
def test_partition_specs_and_gradients_over_a_mesh(axis_type, variables, x):
    layer = moejax.linen.MoE(CONFIG)

    def gradients_of(params, x, state):
        def loss(params):
            y, aux = layer.apply({"params": params, **state}, x)
            return (y**2).sum() + aux.loss

        return jax.jit(jax.grad(loss))(params)

    expected = gradients_of(variables["params"], x, {"RouterState": variables["RouterState"]})
    with jax.set_mesh(make_mesh(ep=4, dp=2, axis_type=axis_type)):
        boxed = init(layer, x)
        specs = linen.get_partition_spec(boxed)
        sharded = linen.unbox(boxed)
        gradients = gradients_of(sharded["params"], x, {"RouterState": sharded["RouterState"]})
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert specs["params"][name] == PartitionSpec("expert", *(None,) * (sharded["params"][name].ndim - 1))
        assert sharded["params"][name].sharding.spec[0] == "expert"
    whole = [specs["params"][name] for name in ("shared_gate_up", "shared_down")]
    for spec in (*whole, specs["params"]["router"]["kernel"], specs["RouterState"]["router"]["correction_bias"]):
        assert not any(spec)
    leaves = zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True)
    for (path, gradient), reference in leaves:
        assert relative_error(gradient, reference) < LIMIT["float32"], jax.tree_util.keystr(path)


@pytest.mark.slow
def test_serving_in_8_bits(rng):
    config = dataclasses.replace(
        CONFIG, hidden_size=128, intermediate_size=128, shared_intermediate_size=0, precision="w8a8"
    )
    layer, x = moejax.linen.MoE(config), normal(rng, 2, 5, 128)
    trained = init(layer, x)
    served = moejax.linen.quantized(trained, config)
    assert set(served["QuantizedParam"]) == {"gate_up", "down"}
    assert same_bits(served["QuantizedParam"]["down"], moejax.quantize_params(as_params(trained), config).down)
    assert set(served["params"]) == set(trained["params"]) - {"gate_up", "down"}
    y, _ = jax.jit(layer.apply)(served, x)
    assert relative_error(y, jax.jit(layer.apply)(trained, x)[0]) < LIMIT["float32"]


@pytest.mark.slow
def test_scanned_over_layers_of_a_mesh(x):
    """Parameters of the layers are stacked, and the new dimension gets a name, or none."""

    class Layers(linen.Module):
        @linen.compact
        def __call__(self, x):
            def body(layer, x, _):
                y, aux = layer(x)
                return x + y, aux.loss

            stacked = linen.scan(
                body,
                variable_axes={"params": 0, "RouterState": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={linen.meta.PARTITION_NAME: None},
            )
            return stacked(moejax.linen.MoE(CONFIG, name="experts"), x, None)

    with jax.set_mesh(make_mesh(ep=4, dp=2)):
        boxed = init(Layers(), x)
        assert linen.get_partition_spec(boxed)["params"]["experts"]["down"] == PartitionSpec(None, "expert", None, None)
        variables = linen.unbox(boxed)
        y, losses = jax.jit(Layers().apply)(variables, x)
    assert variables["params"]["experts"]["down"].shape == (3, 8, 16, 32)
    expected = x
    for i in range(3):
        own = {name: jax.tree.map(lambda leaf, i=i: leaf[i], c["experts"]) for name, c in variables.items()}
        more, _ = jax.jit(moejax.linen.MoE(CONFIG).apply)(jax.device_get(own), expected)
        expected += more
    assert relative_error(y, expected) < LIMIT["float32"]
    assert losses.shape == (3,)


@pytest.mark.slow
def test_inside_a_linen_model(x):
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            y, aux = moejax.linen.MoE(CONFIG, name="experts")(linen.LayerNorm()(x))
            return x + y, aux.loss

    block = Block()
    variables = init(block, x)
    assert set(variables["params"]) == {"LayerNorm_0", "experts"}
    y, loss = jax.jit(block.apply)(variables, x)
    normed = linen.LayerNorm().apply({"params": variables["params"]["LayerNorm_0"]}, x)
    inner = {name: collection["experts"] for name, collection in variables.items() if "experts" in collection}
    alone, aux = moejax.linen.MoE(CONFIG).apply(inner, normed)
    assert relative_error(y, x + alone) < LIMIT["float32"]
    np.testing.assert_allclose(loss, aux.loss, rtol=1e-6)


@pytest.mark.slow
def test_mesh_argument(variables, x):
    mesh = make_mesh(ep=8)
    layer = moejax.linen.MoE(CONFIG, mesh=mesh)
    boxed = layer.init(jax.random.key(0), x)
    assert boxed["params"]["down"].value.sharding.spec[0] == "expert"
    y, _ = jax.jit(layer.apply)(boxed, x)
    expected, _ = jax.jit(moejax.linen.MoE(CONFIG).apply)(variables, x)
    assert relative_error(y, expected) < LIMIT["float32"]


def test_errors_name_what_is_wrong(x):
    with pytest.raises(ValueError, match="num_experts=8 is not divisible by ep=3; choose ep among 1, 2, 4, 8"):
        moejax.linen.MoE(CONFIG, mesh=make_mesh(3)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="got int32; embed token ids first"):
        moejax.linen.MoE(CONFIG).init(jax.random.key(0), jnp.zeros((2, CONFIG.hidden_size), jnp.int32))
    without = with_changes(CONFIG, correction_bias=False)
    assert set(init(moejax.linen.MoE(without), x)) == {"params"}


@pytest.mark.slow
def test_noise_is_of_the_stream_that_the_call_gives(x):
    config = moejax.ROUTERS["noisy_top_k"](dataclasses.replace(CONFIG, router=TopKRouter()))
    layer = moejax.linen.MoE(config)
    variables = init(layer, x)
    call = jax.jit(lambda x, key: layer.apply(variables, x, rngs={"router": key})[1].topk_weights)
    first, again, other = (call(x, jax.random.key(seed)) for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert not np.array_equal(first, other)
    assert same_bits(layer.apply(variables, x, train=False)[1], layer.apply(variables, x, train=False)[1])
    with pytest.raises(ValueError, match=r'in linen call apply.*rngs={"router": key}'):
        layer.apply(variables, x)
    quiet = moejax.linen.MoE(config, deterministic=True)
    assert same_bits(quiet.apply(variables, x)[1], layer.apply(variables, x, train=False)[1])

"""The flax.linen layer: the same parameters and answers as the nnx one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

import moejax
import moejax.linen
from moejax import MoEConfig, make_mesh
from tests.helpers import LIMIT, normal, relative_error, same_bits

CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    shared_intermediate_size=16,
    scoring="sigmoid",
    correction_bias=True,
    expert_bias=True,
    z_loss=0.01,
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


def flat(variables) -> dict:
    """Parameters and router state by name."""
    return {**variables["params"], **variables["RouterState"]}


def test_structure_shapes_and_dtypes_are_those_of_the_nnx_layer(variables):
    layer = moejax.MoE(CONFIG, rngs=nnx.Rngs(0))
    assert set(variables) == {"params", "RouterState"}
    assert set(variables["RouterState"]) == {"correction_bias"}
    expected = {name: value for name, value in vars(layer.params()).items() if value is not None}
    assert set(flat(variables)) == set(expected)
    for name, value in flat(variables).items():
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name


def test_values_differ_with_the_key_only(variables, x):
    layer = moejax.linen.MoE(CONFIG)
    assert same_bits(init(layer, x), variables)
    other = init(layer, x, seed=1)
    assert not np.array_equal(other["params"]["gate_up"], variables["params"]["gate_up"])


def test_apply_equals_the_nnx_layer(variables, x):
    layer = moejax.MoE(CONFIG, rngs=nnx.Rngs(0))
    for name, value in flat(variables).items():
        getattr(layer, name)[...] = value
    expected = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert same_bits(jax.jit(moejax.linen.MoE(CONFIG).apply)(variables, x), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
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
    for name in ("router_kernel", "shared_gate_up", "shared_down"):
        assert not any(specs["params"][name])
    assert not any(specs["RouterState"]["correction_bias"])
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < LIMIT["float32"], name


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
    without = dataclasses.replace(CONFIG, correction_bias=False)
    assert set(init(moejax.linen.MoE(without), x)) == {"params"}

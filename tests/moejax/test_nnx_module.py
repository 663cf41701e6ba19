"""The flax.nnx layer: parameters and their sharding, calls with and without a mesh, transformations."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import MoE, MoEConfig, RouterState, make_mesh, moe, params_spec
from moejax.experts import param_shapes
from tests.helpers import LIMIT, normal, relative_error, same_bits

CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    shared_intermediate_size=16,
    scoring="sigmoid",
    router_bias=True,
    correction_bias=True,
    expert_bias=True,
    load_balance_loss=0.01,
    dtype=jnp.float32,
)
BARE = MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2)
AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])

call = nnx.jit(lambda layer, x: layer(x))


@functools.cache
def mesh_of(axis_type) -> jax.sharding.Mesh:
    return make_mesh(ep=4, dp=2, axis_type=axis_type)


def new_layer(config=CONFIG, **settings) -> MoE:
    return MoE(config, rngs=nnx.Rngs(0), **settings)


@pytest.fixture(scope="module")
def layer():
    """On one chip."""
    return new_layer()


@pytest.fixture(scope="module")
def x():
    """Ten tokens, which eight chips do not divide evenly."""
    return normal(np.random.default_rng(5), 2, 5, CONFIG.hidden_size)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [CONFIG, BARE], ids=["all", "bare"])
def test_shapes_and_dtypes(config, param_dtype):
    module = new_layer(dataclasses.replace(config, param_dtype=param_dtype))
    for name, shape in dataclasses.asdict(param_shapes(config)).items():
        variable = getattr(module, name)
        if shape is None:
            assert variable is None
        else:
            assert variable.shape == shape
            assert variable.dtype == ("float32" if name == "correction_bias" else param_dtype)


def test_initial_values(layer):
    """LeCun normal over the width that each matrix takes in; an expert's fan-in is not that of all experts."""
    inputs = {"router_kernel": 32, "gate_up": 32, "down": 16, "shared_gate_up": 32, "shared_down": 16}
    for name, fan_in in inputs.items():
        deviation = float(getattr(layer, name)[...].std())
        assert abs(deviation * fan_in**0.5 - 1) < 0.2, name
    experts = np.asarray(layer.gate_up[...])
    assert not np.array_equal(experts[0], experts[1])
    for name in ("router_bias", "correction_bias", "gate_up_bias", "down_bias"):
        assert not getattr(layer, name)[...].any()


def test_correction_bias_is_state_and_no_parameter(layer):
    assert isinstance(layer.correction_bias, RouterState)
    assert not isinstance(layer.correction_bias, nnx.Param)
    assert "correction_bias" not in nnx.state(layer, nnx.Param)
    assert list(nnx.state(layer, RouterState)) == ["correction_bias"]


def in_mesh(how: str, mesh) -> MoE:
    if how == "mesh=":
        return new_layer(mesh=mesh)
    with jax.set_mesh(mesh):
        return nnx.jit(new_layer)() if how == "set_mesh, jit" else new_layer()


@AXIS_TYPES
@pytest.mark.parametrize("how", ["set_mesh", "set_mesh, jit", "mesh="])
def test_parameters_lie_over_the_expert_axis(how, axis_type, layer):
    mesh = mesh_of(axis_type)
    module = in_mesh(how, mesh)
    declared = nnx.get_partition_spec(nnx.state(module))
    for name, spec in dataclasses.asdict(params_spec(layer.params())).items():
        value = getattr(module, name)[...]
        assert relative_error(value, getattr(layer, name)[...]) < 1e-6
        if name == "correction_bias":
            continue  # state of the router, not split; it may stay on one device
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, spec), value.ndim), name
        assert tuple(declared[name].get_value()) == (*spec, *(None,) * (value.ndim - len(spec)))
        first = value.shape[0] // 4 if spec else value.shape[0]
        assert {shard.data.shape[0] for shard in value.addressable_shards} == {first}


@pytest.fixture(scope="module")
def expected(layer, x):
    """The layer on one chip: output, loss and gradients."""
    return values_and_gradients(layer, x)


@nnx.jit
def values_and_gradients(layer, x):
    def loss(layer, x):
        y, aux = layer(x)
        return (y**2).sum() + aux.loss, y

    (total, y), gradients = nnx.value_and_grad(loss, has_aux=True)(layer, x)
    return y, total, gradients


@AXIS_TYPES
@pytest.mark.parametrize("how", ["set_mesh", "mesh="])
def test_values_and_gradients_over_a_mesh_equal_those_of_one_chip(how, axis_type, x, expected):
    mesh = mesh_of(axis_type)
    module = in_mesh(how, mesh)
    with jax.set_mesh(mesh) if how == "set_mesh" else contextlib.nullcontext():
        y, total, gradients = values_and_gradients(module, x)
        if how == "mesh=":
            assert relative_error(module(x)[0], expected[0]) < LIMIT["float32"]
    assert relative_error(y, expected[0]) < LIMIT["float32"]
    np.testing.assert_allclose(total, expected[1], rtol=1e-5)
    assert list(gradients) == list(expected[2])
    assert "correction_bias" not in gradients
    for name, gradient in gradients.items():
        assert relative_error(gradient[...], expected[2][name][...]) < LIMIT["float32"], name
        assert gradient[...].sharding.is_equivalent_to(getattr(module, name)[...].sharding, gradient.ndim), name


@pytest.mark.parametrize("spec", [("data",), (None, "expert"), ("data", None, "expert")], ids=str)
def test_in_an_explicit_mesh_the_output_lies_as_the_input(spec, rng):
    """So that a residual `x + layer(x)` type-checks."""
    mesh = mesh_of(AxisType.Explicit)
    x = normal(rng, 2, 8, CONFIG.hidden_size)
    alone, _ = call(new_layer(), x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        y = nnx.jit(lambda layer, x: x + layer(x)[0])(new_layer(), placed)
    assert y.sharding.is_equivalent_to(placed.sharding, 3)
    assert relative_error(y, x + alone) < LIMIT["float32"]


@pytest.mark.parametrize("shape", [(2, 5, 32), (32,)])
def test_call_equals_the_function_on_its_parameters(shape, layer, x):
    x = x.reshape(-1)[: math.prod(shape)].reshape(shape)
    y, aux = call(layer, x)
    expected_y, expected_aux = jax.jit(functools.partial(moe, config=CONFIG))(x, layer.params())
    assert y.shape == x.shape
    assert same_bits((y, aux), (expected_y, expected_aux))
    assert int(aux.load.tokens_per_expert.sum()) == x.size // CONFIG.hidden_size * CONFIG.top_k


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_output_has_the_dtype_of_the_input(dtype, layer, x, expected):
    """The layer computes in float32 here, whatever comes in."""
    y, aux = call(layer, x.astype(dtype))
    assert y.dtype == jnp.dtype(dtype)
    assert aux.loss.dtype == jnp.float32
    rounding = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-6}[dtype]  # of the input; the experts stay the same
    expected_y, _ = call(layer, x.astype(dtype).astype(jnp.float32))
    assert relative_error(y, expected_y) < rounding


def test_rematerialised_layer_has_the_same_gradients(layer, x, expected):
    @nnx.jit
    def gradients_of(layer, x):
        def loss(layer, x):
            y, aux = nnx.remat(lambda layer, x: layer(x))(layer, x)
            return (y**2).sum() + aux.loss

        return nnx.value_and_grad(loss)(layer, x)

    total, gradients = gradients_of(layer, x)
    np.testing.assert_allclose(total, expected[1], rtol=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient[...], expected[2][name][...]) < LIMIT["float32"], name


def test_checkpoint_over_a_mesh(layer, x, expected):
    graph, state = nnx.split(layer)

    @jax.jit
    def gradients_of(state, x):
        @jax.checkpoint
        def loss(state):
            y, aux = moe(x, nnx.merge(graph, state).params(), CONFIG, mesh=mesh_of(AxisType.Auto))
            return (y**2).sum() + aux.loss

        return jax.grad(loss)(state)

    gradients = gradients_of(state, x)
    for name, gradient in expected[2].items():
        assert relative_error(gradients[name][...], gradient[...]) < LIMIT["float32"], name


def test_split_and_merge(layer, x):
    module = nnx.merge(*nnx.split(layer))
    assert same_bits(call(module, x)[0], call(layer, x)[0])


def test_another_name_for_the_expert_axis(x, expected):
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    module = new_layer(mesh=mesh, expert_axis="model")
    assert module.down[...].sharding.spec[0] == "model"
    assert relative_error(call(module, x)[0], expected[0]) < LIMIT["float32"]


def test_a_mesh_without_the_axis():
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=r"the mesh has no axis 'expert', only \('model',\).*make_mesh\(ep, dp\)"):
        new_layer(mesh=mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="the mesh has no axis 'expert'"):
        new_layer()


@pytest.mark.parametrize("ep", [3, 16])
def test_a_mesh_that_does_not_divide_the_experts(ep):
    message = f"num_experts=8 is not divisible by ep={ep}; choose ep among 1, 2, 4, 8"
    with pytest.raises(ValueError, match=message):
        new_layer(mesh=make_mesh(ep))
    with jax.set_mesh(make_mesh(ep)), pytest.raises(ValueError, match=message):
        new_layer()


def test_known_nan_in_the_input(layer, x):
    message = "x holds NaN in 1 of 10 tokens"
    bad = x.at[1, 2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match=message):
        layer(bad)
    with pytest.raises(ValueError, match=message):
        nnx.jit(lambda layer: layer(bad))(layer)
    y, _ = call(layer, bad)
    others = np.ones((2, 5), bool)
    others[1, 2] = False
    assert np.isnan(y[1, 2]).all()
    np.testing.assert_array_equal(y[others], call(layer, x)[0][others])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((4, 32), np.int32), "x must be BF16, FP16 or float32 activations, got int32; embed token ids first"),
        (np.zeros((4, 32), jnp.float8_e4m3fn), "x must be BF16, FP16 or float32 activations, got float8_e4m3fn"),
        (np.zeros((4, 31), np.float32), "x must be [..., H] with hidden_size=32, got [4, 31]"),
        (np.zeros((), np.float32), "x must be [..., H] with hidden_size=32, got []"),
        (np.zeros((2, 0, 32), np.float32), "x must hold at least one token, got [2, 0, 32]"),
    ],
    ids=["integers", "fp8", "width", "scalar", "empty"],
)
def test_inputs_that_do_not_fit(x, message, layer):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(jnp.asarray(x))

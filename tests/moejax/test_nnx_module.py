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
from flax.core import spmd
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import (
    ROUTERS,
    MoE,
    MoEConfig,
    MoEParams,
    Partition,
    QuantizedParam,
    RouterState,
    TopKRouter,
    dense_moe,
    make_mesh,
    moe,
    moe_experts,
    param_specs,
    quantize_params,
    route,
)
from moejax.axes import axes_on
from moejax.models import MLP, MLPConfig
from moejax.params import param_shapes
from pallas_kernels.quantize import QTensor, Quantization
from tests.helpers import LIMIT, normal, raises_saying, relative_error, same_bits

CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    shared_intermediate_size=16,
    shared_gate=True,
    router=TopKRouter(scoring="sigmoid", router_bias=True, correction_bias=True, load_balance_loss=0.01),
    expert_bias=True,
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
@pytest.mark.quick("all-bfloat16", "bare-float32")
def test_shapes_and_dtypes(config, param_dtype):
    module = new_layer(dataclasses.replace(config, param_dtype=param_dtype))
    params = module.params()
    shapes = jax.tree.leaves(param_shapes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == shapes
    for path, leaf in jax.tree.leaves_with_path(params):
        is_state = "correction_bias" in jax.tree_util.keystr(path)
        assert leaf.dtype == ("float32" if is_state else param_dtype)
    assert (params.shared_gate is None) == (config is BARE)
    assert set(params.router) == ({"kernel"} if config is BARE else {"kernel", "bias", "correction_bias"})


def test_initial_values(layer):
    """LeCun normal over the width that each matrix takes in; an expert's fan-in is not that of all experts."""
    inputs = {"gate_up": 32, "down": 16, "shared_gate_up": 32, "shared_down": 16}
    for name, fan_in in inputs.items():
        assert abs(float(getattr(layer, name)[...].std()) * fan_in**0.5 - 1) < 0.2, name
    assert abs(float(layer.router["kernel"][...].std()) * 32**0.5 - 1) < 0.2
    experts = np.asarray(layer.gate_up[...])
    assert not np.array_equal(experts[0], experts[1])
    assert not np.array_equal(experts[0, :, 0], experts[0, :, 1])
    for variable in (layer.gate_up_bias, layer.down_bias, layer.router["bias"], layer.router["correction_bias"]):
        assert not variable[...].any()


def test_initialisers_of_ones_own():
    """Each sees one matrix [in, out]; a number that is its shape's tells which."""

    def by_shape(key, shape, dtype):
        assert len(shape) == 2
        return jnp.full(shape, shape[0] + shape[1] / 100, dtype)

    layer = new_layer(
        dataclasses.replace(CONFIG, shared_intermediate_size=8),
        kernel_init=by_shape,
        bias_init=nnx.initializers.constant(3),
        router_init=nnx.initializers.constant(4),
    )
    expected = {"gate_up": 32.16, "down": 16.32, "shared_gate_up": 32.08, "shared_down": 8.32, "shared_gate": 4}
    expected |= {"gate_up_bias": 3, "down_bias": 3}
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(layer, name)[...], value, rtol=1e-6, err_msg=name)
    router = {name: float(value.mean()) for name, value in layer.params().router.items()}
    assert router == {"kernel": 4, "bias": 3, "correction_bias": 0}


def test_correction_bias_is_state_and_no_parameter(layer):
    assert isinstance(layer.router["correction_bias"], RouterState)
    assert not isinstance(layer.router["correction_bias"], nnx.Param)
    assert "correction_bias" not in nnx.state(layer, nnx.Param)["router"]
    assert [path for path, _ in nnx.to_flat_state(nnx.state(layer, RouterState))] == [("router", "correction_bias")]


def in_mesh(how: str, mesh) -> MoE:
    if how == "mesh=":
        return new_layer(mesh=mesh)
    with jax.set_mesh(mesh):
        return nnx.jit(new_layer)() if how == "set_mesh, jit" else new_layer()


def by_path(params: MoEParams) -> dict[tuple[str, ...], jax.Array]:
    """As the paths of a module's state are."""
    leaves = jax.tree.leaves_with_path(params)
    return {tuple(jax.tree_util.keystr(path, simple=True, separator=".").split(".")): leaf for path, leaf in leaves}


def check_parameters(module: MoE, layer: MoE, mesh) -> None:
    """Those of `layer`, split over `mesh` as they declare."""
    specs = by_path(param_specs(layer.params(), layer.config, axes_on(mesh, None, layer.config)))
    declared = dict(nnx.to_flat_state(nnx.get_partition_spec(nnx.state(module))))
    values, alone = by_path(module.params()), by_path(layer.params())
    assert set(specs) == set(declared) == set(values) == set(alone)
    for path, spec in specs.items():
        assert relative_error(values[path], alone[path]) < 1e-6
        assert values[path].sharding.is_equivalent_to(NamedSharding(mesh, spec), values[path].ndim), path
        assert tuple(declared[path].get_value()) == tuple(spec), path


@AXIS_TYPES
@pytest.mark.parametrize("how", ["set_mesh", "set_mesh, jit", "mesh="])
@pytest.mark.slow
def test_parameters_lie_over_the_expert_axis(how, axis_type, layer):
    mesh = mesh_of(axis_type)
    module = in_mesh(how, mesh)
    check_parameters(module, layer, mesh)
    assert {shard.data.shape[0] for shard in module.down[...].addressable_shards} == {2}


def test_parameters_lie_over_every_axis_that_splits_them(layer):
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        module = new_layer()
    check_parameters(module, layer, mesh)
    assert {shard.data.shape for shard in module.gate_up[...].addressable_shards} == {(4, 16, 2, 8)}
    assert {shard.data.shape for shard in module.router["kernel"][...].addressable_shards} == {(16, 8)}


def num_exchanges(layer, x):
    return nnx.jit(lambda layer, x: layer(x)[0]).lower(layer, x).compile().as_text().count("all-to-all(")


@pytest.mark.slow
def test_calls_of_a_quantised_layer_outside_of_the_mesh_are_spread_too(x):
    by_rows = Quantization(lhs_scaling="per_row", rhs_scaling="per_channel")
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        layer = new_layer(dataclasses.replace(CONFIG, quantization=by_rows))
    assert num_exchanges(layer.quantized(), x) > 0


def test_calls_outside_of_the_mesh_are_spread_over_the_one_that_the_layer_was_made_on(x):
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        layer = new_layer()
    assert num_exchanges(layer, x) > 0
    y, _ = layer(x)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        inside, _ = layer(x)
    assert same_bits(y, inside)
    with pytest.warns(UserWarning, match="made under jit over the mesh .* is called without a mesh"):
        in_mesh("set_mesh, jit", mesh_of(AxisType.Auto))(x)


def test_a_layer_keeps_the_logical_axis_rules_that_it_was_made_under(x):
    mesh = jax.make_mesh((2, 2), ("zero", "ep"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    rules = [("expert", "ep"), ("embed", "zero"), ("tokens", ("zero", "ep"))]
    with jax.set_mesh(mesh):
        with spmd.logical_axis_rules(rules):
            layer = new_layer()
            other = new_layer(partition=Partition(expert="zero", tokens=("zero", "ep")))
            network = MLP(MLPConfig(CONFIG.hidden_size, 16), rngs=nnx.Rngs(0))
        y, _ = layer(x)
    assert relative_error(y, new_layer()(x)[0]) < LIMIT["float32"]
    assert layer.partition == network.partition == Partition.from_rules(rules)
    assert other.partition == Partition(expert="zero", tokens=("zero", "ep"))


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
@pytest.mark.slow
def test_values_and_gradients_over_a_mesh_equal_those_of_one_chip(how, axis_type, x, expected):
    mesh = mesh_of(axis_type)
    module = in_mesh(how, mesh)
    with jax.set_mesh(mesh) if how == "set_mesh" else contextlib.nullcontext():
        y, total, gradients = values_and_gradients(module, x)
        if how == "mesh=":
            assert relative_error(module(x)[0], expected[0]) < LIMIT["float32"]
    assert relative_error(y, expected[0]) < LIMIT["float32"]
    np.testing.assert_allclose(total, expected[1], rtol=1e-5)
    check_gradients(gradients, expected[2])
    parameters = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    for path, gradient in nnx.to_flat_state(gradients):
        assert gradient[...].sharding.is_equivalent_to(parameters[path][...].sharding, gradient.ndim), path


def check_gradients(gradients, expected) -> None:
    """Those of all parameters, and of nothing else."""
    gradients, expected = dict(nnx.to_flat_state(gradients)), dict(nnx.to_flat_state(expected))
    assert set(gradients) == set(expected)
    assert ("router", "kernel") in gradients
    assert ("router", "correction_bias") not in gradients
    for path, gradient in gradients.items():
        assert relative_error(gradient[...], expected[path][...]) < LIMIT["float32"], path


@pytest.mark.parametrize("spec", [("data",), (None, "expert"), ("data", None, "expert")], ids=str)
@pytest.mark.slow
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
@pytest.mark.quick("shape1")
def test_call_equals_the_function_on_its_parameters(shape, layer, x):
    x = x.reshape(-1)[: math.prod(shape)].reshape(shape)
    y, aux = call(layer, x)
    expected_y, expected_aux = jax.jit(functools.partial(moe, config=CONFIG))(x, layer.params())
    assert y.shape == x.shape
    assert same_bits((y, aux), (expected_y, expected_aux))
    assert int(aux.load.tokens_per_expert.sum()) == x.size // CONFIG.hidden_size * CONFIG.top_k


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.slow
def test_output_has_the_dtype_of_the_input(dtype, layer, x, expected):
    """The layer computes in float32 here, whatever comes in."""
    y, aux = call(layer, x.astype(dtype))
    assert y.dtype == jnp.dtype(dtype)
    assert aux.loss.dtype == jnp.float32
    rounding = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-6}[dtype]  # of the input; the experts stay the same
    expected_y, _ = call(layer, x.astype(dtype).astype(jnp.float32))
    assert relative_error(y, expected_y) < rounding


@pytest.mark.slow
def test_rematerialised_layer_has_the_same_gradients(layer, x, expected):
    @nnx.jit
    def gradients_of(layer, x):
        def loss(layer, x):
            y, aux = nnx.remat(lambda layer, x: layer(x))(layer, x)
            return (y**2).sum() + aux.loss

        return nnx.value_and_grad(loss)(layer, x)

    total, gradients = gradients_of(layer, x)
    np.testing.assert_allclose(total, expected[1], rtol=1e-6)
    check_gradients(gradients, expected[2])


@pytest.mark.slow
def test_checkpoint_over_a_mesh(layer, x, expected):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def gradients_of(params, rest, x):
        @jax.checkpoint
        def loss(params):
            y, aux = moe(x, nnx.merge(graph, params, rest).params(), CONFIG, mesh=mesh_of(AxisType.Auto))
            return (y**2).sum() + aux.loss

        return jax.grad(loss)(params)

    check_gradients(gradients_of(params, rest, x), expected[2])


def test_split_and_merge(layer, x):
    module = nnx.merge(*nnx.split(layer))
    assert same_bits(call(module, x)[0], call(layer, x)[0])


def test_from_params(layer, x):
    again = MoE.from_params(layer.params(), CONFIG)
    assert same_bits(call(again, x), call(layer, x))
    assert type(again.router["correction_bias"]) is RouterState
    with pytest.raises(ValueError, match=r"params\.down must be \[8, 16, 32\]"):
        MoE.from_params(dataclasses.replace(layer.params(), down=layer.gate_up[...]), CONFIG)
    with pytest.raises(ValueError, match=r"rngs must be given, such as nnx\.Rngs\(0\); from_params takes"):
        MoE(CONFIG)


@AXIS_TYPES
@pytest.mark.slow
def test_from_params_over_a_mesh(axis_type, layer, x, expected):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        again = MoE.from_params(layer.params(), CONFIG)
        check_parameters(again, layer, mesh)
        assert relative_error(call(again, x)[0], expected[0]) < LIMIT["float32"]


@pytest.mark.parametrize("chips", [1, 8])
@pytest.mark.slow
def test_a_layer_for_serving_in_8_bits(chips, rng):
    """The weights of experts are rounded once, and take no gradient; nothing else is touched."""
    config = dataclasses.replace(
        CONFIG, hidden_size=128, intermediate_size=128, shared_intermediate_size=128, precision="w8a8"
    )
    trained, x = new_layer(config), normal(rng, 2, 5, 128)
    served = trained.quantized()
    assert same_bits(served.params(), quantize_params(trained.params(), config))
    kinds = {name: type(getattr(served, name)) for name in ("gate_up", "down", "shared_gate_up", "shared_down")}
    assert set(kinds.values()) == {QuantizedParam}
    assert type(served.down_bias) is type(served.router["kernel"]) is nnx.Param
    expected_y, expected_aux = call(served, x)
    assert relative_error(expected_y, call(trained, x)[0]) < LIMIT["float32"]
    with jax.set_mesh(make_mesh(ep=4, dp=2)) if chips > 1 else contextlib.nullcontext():
        there = new_layer(config).quantized() if chips > 1 else MoE.from_params(served.params(), config)
        y, aux = call(there, x)
        gradients = nnx.jit(nnx.grad(lambda layer, x: layer(x)[0].sum()))(there, x)
    assert relative_error(y, expected_y) < 1e-2
    assert same_bits(aux.topk_ids, expected_aux.topk_ids)
    assert "down" not in gradients
    assert gradients["router"]["kernel"][...].any()


@AXIS_TYPES
@pytest.mark.quick("explicit")
def test_weights_are_rounded_where_they_lie(axis_type):
    """On axes of any name, of any type, and what else was said of the layer stays said."""
    config = dataclasses.replace(BARE, hidden_size=256, intermediate_size=256, precision="w8a8")
    partition = Partition(expert="ep", embed="zero", mlp="tp", tokens=("zero", "ep", "tp"))
    mesh = jax.make_mesh((2, 2, 2), ("zero", "ep", "tp"), (axis_type,) * 3, devices=jax.devices()[:8])
    layer = new_layer(config, mesh=mesh, partition=partition, deterministic=True)
    served = layer.quantized()
    on_one_chip = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), layer.params())
    assert same_bits(served.params(), quantize_params(on_one_chip, config))
    assert (served.mesh, served.partition, served.deterministic) == (mesh, partition, True)
    for leaf in jax.tree.leaves((served.gate_up.get_value(), served.down.get_value())):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


@pytest.mark.slow
def test_a_noisy_layer_in_8_bits_keeps_its_noise(rng):
    config = dataclasses.replace(ROUTERS["noisy_top_k"](BARE), hidden_size=128, intermediate_size=128, precision="w8a8")
    layer = MoE(config, rngs=nnx.Rngs(params=0, router=1))
    layer.router["noise_kernel"][...] = normal(rng, 128, 8)
    served, x = layer.quantized(), normal(rng, 40, 128, dtype="bfloat16")
    assert served.noise is layer.noise
    ids = [served(x, train=train)[1].topk_ids for train in (True, False, False)]
    assert not same_bits(ids[0], ids[1])
    assert same_bits(ids[1], ids[2])


def test_update_moves_the_correction_bias(x):
    module = new_layer(dataclasses.replace(CONFIG, router=dataclasses.replace(CONFIG.router, update_rate=0.5)))
    _, aux = call(module, x)
    nnx.jit(lambda layer, aux: layer.update(aux))(module, aux)
    load = np.asarray(aux.load.tokens_per_expert)
    np.testing.assert_array_equal(module.router["correction_bias"][...], 0.5 * np.sign(load.mean() - load))


def test_update_goes_by_what_was_chosen_not_by_what_had_room(x):
    plain = new_layer()
    capped = new_layer(dataclasses.replace(CONFIG, capacity_factor=0.25))
    for module in (plain, capped):
        _, aux = call(module, x)
        module.update(aux)
    assert int(aux.load.dropped) > 0
    assert same_bits(capped.router["correction_bias"][...], plain.router["correction_bias"][...])
    assert np.asarray(plain.router["correction_bias"][...]).any()


def test_a_name_is_no_configuration():
    with raises_saying(
        TypeError, "config must be a MoEConfig, got str; get_preset('mixtral-8x7b') makes one of a name"
    ):
        MoE("mixtral-8x7b", rngs=nnx.Rngs(0))


def test_other_things_are_no_configurations(layer, rng):
    x, params, config = normal(rng, 4, layer.config.hidden_size), layer.params(), layer.config
    chosen = jnp.ones((4, 1)), jnp.zeros((4, 1), jnp.int32)
    for run in (
        lambda: moe(x, config, params),
        lambda: moe_experts(x, *chosen, config, params),
        lambda: dense_moe(x, config, params),
        lambda: quantize_params(params, params),
        lambda: route(x, params.router["kernel"], params),
    ):
        with raises_saying(TypeError, "config must be a MoEConfig, got MoEParams"):
            run()


def test_parameters_of_a_layer_are_not_the_layer(layer):
    with raises_saying(TypeError, "params must be MoEParams, got MoE; of a layer, layer.params()"):
        quantize_params(layer, layer.config)


def test_weights_that_a_block_does_not_divide_are_named():
    config = MoEConfig(hidden_size=64, intermediate_size=32, num_experts=4, top_k=1)
    with raises_saying(ValueError, "gate_up does not fit config.quantization.rhs_scaling", "not divisible by 128"):
        MoE(config, rngs=nnx.Rngs(0)).quantized()


@pytest.mark.parametrize(("width", "blocks"), [(144, "72"), (192, "96"), (384, None)])
def test_scales_of_blocks_that_an_edge_cuts_are_refused(rng, width, blocks):
    """A QTensor has equal blocks: two scales for 144 columns are surely not of 72 each."""
    config = MoEConfig(256, width, 4, 2)
    params = MoE(config, rngs=nnx.Rngs(0)).params()
    values = normal(rng, 4, 256, width).astype("float8_e4m3fn")
    params = dataclasses.replace(params, down=QTensor(values, jnp.ones((4, 2, -(-width // 128)))))
    if blocks is None:
        assert MoE.from_params(params, config).down.get_value().shape == values.shape
        return
    with raises_saying(ValueError, "params.down: scale [4, 2, 2]", f"blocks of 128 x {blocks}", "dequantise"):
        MoE.from_params(params, config)


def test_update_takes_what_one_step_says(layer, x):
    _, aux = call(layer, x)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), aux)
    with raises_saying(ValueError, "aux.load.tokens_per_expert must be [8]", "got [2, 8]", "add up"):
        layer.update(two)
    with raises_saying(ValueError, "aux must be the MoEAux", "got LoadStats"):
        layer.update(aux.load)
    layer.update(jax.tree.map(lambda leaf: leaf.sum(0), two))


def test_causal():
    """First choices of later tokens take room from second choices of earlier ones."""
    assert new_layer(BARE).causal
    assert not new_layer(dataclasses.replace(BARE, capacity_factor=1.0)).causal
    assert new_layer(dataclasses.replace(BARE, capacity_factor=1.0, top_k=1)).causal


@pytest.mark.slow
def test_another_name_for_the_expert_axis(x, expected):
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    module = new_layer(mesh=mesh, partition=Partition(expert="model"))
    assert module.down[...].sharding.spec[0] == "model"
    assert relative_error(call(module, x)[0], expected[0]) < LIMIT["float32"]


def test_a_mesh_without_the_axis():
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=r"the mesh has no axis 'expert'.* only \('model',\).*make_mesh\(ep, dp\)"):
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

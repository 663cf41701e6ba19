"""The expert MLP against numpy, the check of parameters, and weights that are kept in 8 bits."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import (
    MoEConfig,
    QTensor,
    Quantization,
    dense_moe,
    dequantize,
    make_mesh,
    moe,
    quantize,
    quantize_params,
    with_changes,
)
from moejax.experts import expert_mlp, math_of, shared_mlp
from moejax.params import EXPERT_FIELDS, EXPERT_WEIGHTS, check_params
from pallas_kernels.quantize import ToRound
from tests.helpers import LIMIT, float64, normal, relative_error, same_bits
from tests.moejax.layers import random_params

CONFIG = MoEConfig(hidden_size=24, intermediate_size=16, num_experts=4, top_k=2, expert_bias=True, dtype=jnp.float32)
GROUP_SIZES = (3, 0, 17, 5)
NUM_ROWS = 32  # seven rows belong to no expert

mlp = functools.partial(jax.jit, static_argnames="math")(expert_mlp)
to_8_bits = functools.partial(jax.jit, static_argnames="config")(quantize_params)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


GATED = {
    "silu": lambda gate, up: gate * sigmoid(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "gelu_tanh": lambda gate, up: gelu_tanh(gate) * up,
    "swigluoai": lambda gate, up: gate * sigmoid(1.702 * gate) * (up + 1),
    "relu2": lambda gate, up: np.maximum(gate, 0) ** 2 * up,
}


def expected_mlp(rows, params, config):
    """Row by row in float64."""
    out = np.zeros(rows.shape)
    experts = np.repeat(np.arange(config.num_experts), GROUP_SIZES)
    for row, expert in enumerate(experts):
        gate, up = (float64(rows)[row] @ float64(params.gate_up)[expert, :, half] for half in (0, 1))
        if params.gate_up_bias is not None:
            gate, up = (gate, up) + float64(params.gate_up_bias)[expert]
        if config.activation_limit is not None:
            gate = np.minimum(gate, config.activation_limit)
            up = np.clip(up, -config.activation_limit, config.activation_limit)
        out[row] = GATED[config.activation](gate, up) @ float64(params.down)[expert]
        if params.down_bias is not None:
            out[row] += float64(params.down_bias)[expert]
    return out


def run_mlp(rows, params, config):
    weights = {name: getattr(params, name) for name in EXPERT_FIELDS}
    return mlp(rows, jnp.array(GROUP_SIZES, jnp.int32), math=math_of(config), **weights)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("limit", [None, 0.5], ids=["", "limit"])
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.quick("silu--bias", "gelu-limit-", "gelu_tanh--", "swigluoai-limit-bias", "relu2-limit-bias")
def test_mlp_equals_numpy(activation, limit, with_bias, rng):
    config = dataclasses.replace(CONFIG, activation=activation, activation_limit=limit, expert_bias=with_bias)
    params, rows = random_params(config, rng), normal(rng, NUM_ROWS, config.hidden_size)
    out = run_mlp(rows, params, config)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected_mlp(rows, params, config)) < LIMIT["float32"]
    assert not out[sum(GROUP_SIZES) :].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mlp_in_16_bits(dtype, rng):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    rows = normal(rng, NUM_ROWS, config.hidden_size, dtype=dtype)
    params = random_params(config, rng)
    in_16_bits = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    rounded = dataclasses.replace(params, gate_up=in_16_bits.gate_up, down=in_16_bits.down)
    out = run_mlp(rows, params, config)
    assert out.dtype == jnp.dtype(dtype)
    # Between the two products the row is rounded once more.
    assert relative_error(out, expected_mlp(rows, rounded, config)) < 2 * LIMIT[dtype]


def test_shared_expert_is_a_group_of_all_tokens(rng):
    config = dataclasses.replace(CONFIG, shared_intermediate_size=16)
    params, x = random_params(config, rng), normal(rng, 9, config.hidden_size)
    gate, up = (float64(x) @ float64(params.shared_gate_up)[:, half] for half in (0, 1))
    out = shared_mlp(x, params.shared_gate_up, params.shared_down, math_of(config), config)
    assert relative_error(out, GATED["silu"](gate, up) @ float64(params.shared_down)) < LIMIT["float32"]


def test_shared_expert_with_an_activation_and_a_gate_of_its_own(rng):
    config = dataclasses.replace(
        CONFIG,
        activation="swigluoai",
        activation_limit=7.0,
        shared_intermediate_size=16,
        shared_activation="silu",
        shared_gate=True,
    )
    params, x = random_params(config, rng), normal(rng, 9, config.hidden_size)
    with_shared, _ = jax.jit(functools.partial(moe, config=config))(x, params)
    bare = dataclasses.replace(config, shared_intermediate_size=0, shared_activation=None, shared_gate=False)
    without = dataclasses.replace(params, shared_gate_up=None, shared_down=None, shared_gate=None)
    routed, _ = jax.jit(functools.partial(moe, config=bare))(x, without)
    gate, up = (float64(x) @ float64(params.shared_gate_up)[:, half] for half in (0, 1))
    shared = GATED["silu"](gate, up) @ float64(params.shared_down) * sigmoid(float64(x) @ float64(params.shared_gate))
    assert relative_error(with_shared, float64(routed) + shared) < LIMIT["float32"]
    assert relative_error(with_shared, jax.jit(dense_moe, static_argnums=2)(x, params, config)) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate_up": (4, 24, 32)},
            "params.gate_up must be [4, 24, 2, 16], got [4, 24, 32]; gate and up have an axis of their own: "
            "pack_experts() makes it of a checkpoint's weights",
        ),
        ({"gate_up": (4, 24, 2, 15)}, "params.gate_up must be [4, 24, 2, 16], got [4, 24, 2, 15]"),
        (
            {"down": (4, 24, 16)},
            "params.down must be [4, 16, 24], got [4, 24, 16]; these are matrices [out, in]: "
            "pack_experts(layout='out_in') turns them",
        ),
        ({"gate_up_bias": (4, 32)}, "params.gate_up_bias must be [4, 2, 16], got [4, 32]"),
        ({"down_bias": None}, "params.down_bias must be [4, 24], got None"),
        ({"down_bias": (24,)}, "params.down_bias must be [4, 24], got [24]"),
        ({"shared_down": (16, 24)}, "params.shared_down must be None (the configuration has none), got [16, 24]"),
    ],
)
def test_parameters_that_do_not_fit(changes, message, rng):
    params = random_params(CONFIG, rng)
    check_params(params, CONFIG)
    changed = {name: None if shape is None else jnp.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        moe(normal(rng, 2, 24), dataclasses.replace(params, **changed), CONFIG)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kernel": (24, 5)}, "params.router['kernel'] must be [24, 4], got [24, 5]"),
        ({"kernel": (4, 24)}, "params.router['kernel'] must be [24, 4], got [4, 24]; is it [out, in]? transpose it"),
        ({}, "params.router must hold ['kernel'], those of TopKRouter, got []"),
        (None, "params.router must hold ['kernel'], those of TopKRouter, got []"),
        (
            {"kernel": (24, 4), "bias": (4,), "correction_bias": (4,)},
            "params.router must hold ['kernel'], those of TopKRouter, got ['bias', 'correction_bias', 'kernel']",
        ),
    ],
    ids=str,
)
def test_parameters_of_the_router_that_do_not_fit(router, message, rng):
    changed = None if router is None else {name: jnp.zeros(shape) for name, shape in router.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        moe(normal(rng, 2, 24), dataclasses.replace(random_params(CONFIG, rng), router=changed), CONFIG)


def test_a_vector_of_the_router_that_does_not_fit(rng):
    config = with_changes(CONFIG, router_bias=True)
    params = random_params(config, rng)
    router = {**params.router, "bias": jnp.zeros(5)}
    with pytest.raises(ValueError, match=re.escape("params.router['bias'] must be [4], got [5]")):
        moe(normal(rng, 2, 24), dataclasses.replace(params, router=router), config)


def test_parameters_in_8_bits_that_are_no_qtensors(rng):
    params = random_params(CONFIG, rng)
    in_8_bits = dataclasses.replace(params, down=params.down.astype("float8_e4m3fn"))
    with pytest.raises(ValueError, match=r"params\.down must be BF16, FP16 or float32, or a QTensor for 8 bits"):
        check_params(in_8_bits, CONFIG)
    bias = quantize(params.down_bias, scaling="per_row")
    with pytest.raises(ValueError, match=r"params\.down_bias must be \[4, 24\]|params\.down_bias must be an array"):
        check_params(dataclasses.replace(params, down_bias=bias), CONFIG)


QUANTIZATIONS = {
    "fp8-blocks": Quantization(),
    "e5m2-channels": Quantization("float8_e5m2", "per_row", "per_channel"),
    "int8-tensor": Quantization("int8", "per_row", "per_tensor"),
}


def config_in_8_bits(name: str) -> MoEConfig:
    return MoEConfig(
        hidden_size=256,
        intermediate_size=128,
        num_experts=4,
        top_k=2,
        shared_intermediate_size=128,
        expert_bias=True,
        precision="w8a8",
        quantization=QUANTIZATIONS[name],
        dtype=jnp.float32,
    )


def in_out_last(field: str, weights: jax.Array) -> jax.Array:
    """The matrices of one field, [in, out] the last two dimensions: gate and up as two matrices."""
    return jnp.moveaxis(weights, -2, -3) if field.endswith("gate_up") else weights


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.quick("int8-tensor")
def test_quantised_parameters(name, rng):
    config = config_in_8_bits(name)
    params = random_params(config, rng)
    served = to_8_bits(params, config=config)
    for field in EXPERT_WEIGHTS:
        weights, rounded = in_out_last(field, getattr(params, field)), getattr(served, field)
        assert isinstance(rounded, QTensor)
        assert rounded.dtype == jnp.dtype(config.quantization.dtype)
        assert relative_error(dequantize(rounded.mT), weights) < 0.1
    for field in ("router", "gate_up_bias", "down_bias"):
        assert same_bits(getattr(served, field), getattr(params, field))
    check_params(served, config)
    assert same_bits(to_8_bits(served, config=config), served)


def test_mlp_in_8_bits_rounds_each_operand_once(rng):
    """Rounding the activated rows to BF16 before rounding them to 8 bits would move one value in thirty."""
    config = dataclasses.replace(config_in_8_bits("fp8-blocks"), dtype="bfloat16", expert_bias=False)
    params, rows = random_params(config, rng), normal(rng, sum(GROUP_SIZES), config.hidden_size, dtype="bfloat16")

    @functools.partial(jax.jit, static_argnums=1)
    def there_and_back(values, scaling):
        return dequantize(quantize(values, scaling=scaling))

    def rounded(values, scaling):
        return float64(there_and_back(jnp.asarray(values, jnp.float32), scaling))

    experts = np.repeat(np.arange(config.num_experts), GROUP_SIZES)
    gate_up = rounded(in_out_last("gate_up", params.gate_up), "128x128")[experts]
    h = rounded(GATED["silu"](*np.einsum("rh,rjhi->jri", rounded(rows, "1x128"), gate_up)), "1x128")
    expected = np.einsum("ri,rih->rh", h, rounded(params.down, "128x128")[experts])
    assert relative_error(run_mlp(rows, params, config), expected) < LIMIT["bfloat16"]


@pytest.mark.parametrize("name", ["fp8-blocks", "e5m2-channels", "int8-tensor"])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.quick("1-fp8-blocks")
def test_what_no_gradient_is_asked_of_gives_the_same(name, ep, rng):
    """Rows that stay in 8 bits from the tokens to kernel two, against those that are rounded before each kernel."""
    config = config_in_8_bits(name)
    params, x = random_params(config, rng), normal(rng, 7, config.hidden_size)
    layer = functools.partial(moe, config=config, mesh=make_mesh(ep) if ep > 1 else None)
    served, _ = jax.jit(layer)(x, params)
    trained, _, _ = jax.jit(lambda x, params: jax.vjp(lambda x: layer(x, params), x, has_aux=True))(x, params)
    assert relative_error(served, trained) < LIMIT["float32"]


@pytest.mark.parametrize(("ep", "tokens", "rows"), [(1, 7, 14), (2, 4, 16)])
def test_tokens_are_rounded_before_they_are_copied(ep, tokens, rows, rng):
    config = dataclasses.replace(config_in_8_bits("fp8-blocks"), shared_intermediate_size=0)
    params, x = random_params(config, rng), normal(rng, 7, config.hidden_size)
    layer = functools.partial(moe, config=config, mesh=make_mesh(ep) if ep > 1 else None)
    served = str(jax.make_jaxpr(layer)(x, params))
    trained = str(jax.make_jaxpr(lambda x: jax.vjp(lambda x: layer(x, params)[0], x)[0])(x))
    for program in (served, trained):
        # The bits of the blocks whose largest is looked for: of a chip's tokens, or of the rows that they become.
        assert (f"i32[{tokens},1,2,128]" in program, f"i32[{rows},1,2,128]" in program) == (True, False)


@pytest.mark.parametrize("transport", ["dense", "ragged"])
@pytest.mark.quick("dense")
def test_in_serving_rows_travel_as_they_are_multiplied(transport, rng):
    """Rounded once, whatever training sends: with the scales of the product, so that every ep computes the same."""
    config = dataclasses.replace(config_in_8_bits("fp8-blocks"), transport=transport)
    params, x = to_8_bits(random_params(config, rng), config=config), normal(rng, 8, config.hidden_size)
    params, x = jax.device_get((params, x))  # which no program has to slice for the chips
    y, _ = jax.jit(functools.partial(moe, config=config, mesh=make_mesh(2)))(x, params)
    coarse = dataclasses.replace(config, wire_scaling="per_row")
    assert same_bits(y, jax.jit(functools.partial(moe, config=coarse, mesh=make_mesh(2)))(x, params)[0])
    alone, _ = jax.jit(functools.partial(moe, config=config))(x, params)
    assert relative_error(y, alone) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("name", "ep"), [("fp8-blocks", 1), ("fp8-blocks", 2), ("e5m2-channels", 1), ("int8-tensor", 2)]
)
@pytest.mark.slow
def test_serving_equals_quantising_on_the_fly(name, ep, rng):
    """The weights that training rounds in every step are the ones that serving keeps, to the bit."""
    config = config_in_8_bits(name)
    params, x = random_params(config, rng), normal(rng, 7, config.hidden_size)
    layer = jax.jit(functools.partial(moe, config=config, mesh=make_mesh(ep) if ep > 1 else None))
    y, _ = layer(x, params)
    stored = quantize_params(params, config)
    served, _ = layer(x, stored)
    assert same_bits(
        stored.down.mT, quantize(params.down, config.quantization.dtype, scaling=config.quantization.rhs_scaling)
    )
    assert np.abs(y).max() > 0
    assert relative_error(served, y) < LIMIT["float32"]  # the matrices lie differently, so sums differ in their order


@pytest.mark.slow
def test_one_scale_for_gate_and_up_where_a_matrix_has_one(rng):
    config = config_in_8_bits("int8-tensor")
    served = quantize_params(random_params(config, rng), config)
    assert served.gate_up.scale.shape == (config.num_experts, 1, 1, 1)


def test_rows_travel_in_the_type_of_the_operands(rng):
    config = dataclasses.replace(config_in_8_bits("int8-tensor"), shared_intermediate_size=0)
    params, x = random_params(config, rng), normal(rng, 8, config.hidden_size)
    layer = functools.partial(moe, config=config, mesh=make_mesh(2))
    assert "f8" not in str(jax.make_jaxpr(layer)(x, params))


def test_parameters_without_a_shared_expert_stay_so(rng):
    config = dataclasses.replace(config_in_8_bits("fp8-blocks"), shared_intermediate_size=0)
    served = quantize_params(random_params(config, rng), config)
    assert served.shared_gate_up is served.shared_down is None


@pytest.mark.parametrize(("scaling", "is_late"), [("1x128", True), ("per_row", False), ("per_tensor", False)])
def test_who_rounds_tokens(rng, scaling, is_late):
    """Whoever copies them, if their scales are those that it gives, and nobody else takes them."""
    config = MoEConfig(128, 128, 4, 2, precision="w8a8", quantization=Quantization(lhs_scaling=scaling))
    serving, x = dataclasses.replace(math_of(config), stays_in_8_bits=True), normal(rng, 4, 128)
    assert isinstance(serving.rounded(x, late=True), ToRound) == is_late
    for other in (serving.rounded(x), math_of(config).rounded(x, late=True)):
        assert not isinstance(other, ToRound)

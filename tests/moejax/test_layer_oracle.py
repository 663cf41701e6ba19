"""The whole layer against the dense oracle: every preset's routing, every ep, every precision, values and gradients."""

import dataclasses
import functools
import itertools
import math
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import PRESETS, MoEConfig, Quantization, dense_moe, make_mesh, moe
from tests.conftest import SEED
from tests.helpers import relative_error
from tests.moejax.layers import clear_cut_tokens, narrow, random_params
from tests.pallas_kernels.kernels_tpu import interpreted

# Largest relative error against the oracle on the same operands, and against the float32 one.
LIMITS = {
    ("w16a16", "float32"): (1e-5, 1e-5),
    ("w16a16", "bfloat16"): (1e-2, 1e-2),
    ("w8a8", "bfloat16"): (1e-2, 8e-2),
}
# As many tokens as no number of chips divides, and enough for the error of a sum over them to be steady.
SHAPE = (3, 111)
# For gradients of which both factors are products of rounded numbers, as the router's are.
LONG = (3, 4 * 111)

# Presets that differ in widths only, which these tests set.
SAME_WHEN_NARROW = {"deepseek-v3.2": "deepseek-v3", "qwen3-235b-a22b": "qwen3-30b-a3b"}

EPS = (1, 2, 4, 8, 32)


def cases():
    """Every preset with every precision on every number of chips."""
    for preset in PRESETS:
        for (precision, dtype), ep in itertools.product(LIMITS, EPS):
            if PRESETS[preset].num_experts % ep:
                continue
            # One worker takes all ep of a layer, and of another that is the same when narrow, and so shares its oracle.
            name = SAME_WHEN_NARROW.get(preset, preset)
            group = pytest.mark.xdist_group(f"{name}-{precision}-{dtype}")
            config = narrow(preset, precision=precision, dtype=jnp.dtype(dtype))
            yield pytest.param(config, ep, id=f"{preset}-{precision}-{dtype}-ep{ep}", marks=group)


@functools.cache
def problem(config: MoEConfig, shape: tuple[int, int] = SHAPE):
    """Parameters, tokens, and a direction for the gradient."""
    rng = np.random.default_rng(int(os.environ[SEED]))
    params = random_params(config, rng)
    x = clear_cut_tokens(math.prod(shape), config, params, rng).reshape(*shape, -1)
    return params, x, jnp.asarray(rng.standard_normal(x.shape), jnp.float32)


@functools.cache
def layer(config: MoEConfig, ep: int, shape: tuple[int, int] = SHAPE):
    """The layer's output, its gradients for x and every parameter, and what it says of the load."""
    params, x, direction = problem(config, shape)
    mesh = make_mesh(ep) if ep > 1 else None

    def loss(x, params):
        y, aux = moe(x, params, config, mesh=mesh)
        return (y.astype(jnp.float32) * direction).sum(), (y, aux)

    (_, (y, aux)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    return y, gradients, aux.load


@functools.cache
def oracle(config: MoEConfig, quantized: bool, shape: tuple[int, int] = SHAPE):
    """The oracle's output, and its gradients for x and every parameter."""
    params, x, direction = problem(config, shape)

    def loss(x, params):
        keeps = quantized and config.intermediate_size % 128 == 0
        y = dense_moe(x, params, config, quantized=quantized, keeps_pre_activations=keeps)
        return (y * direction).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x.astype(jnp.float32), params)
    return y, gradients


@pytest.mark.parametrize(("config", "ep"), list(cases()))
@pytest.mark.quick("mixtral-8x7b-w8a8-bfloat16-ep1")
def test_layer_equals_the_dense_oracle(config, ep):
    check_layer(config, ep)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize("preset", ["qwen3-30b-a3b", "mixtral-8x7b"])
@pytest.mark.quick("mixtral-8x7b-1")
def test_layers_of_which_blocks_have_a_scale_equal_the_dense_oracle(preset, ep):
    config = narrow(preset, hidden=256, width=128, precision="w8a8", dtype=jnp.dtype("bfloat16"))
    check_layer(config, ep)


@pytest.mark.parametrize("weights_gradient_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1-float8_e4m3fn")
def test_gradients_of_weights_in_8_bits(ep, weights_gradient_dtype):
    """Of activations and cotangents that are rounded once more: by less than what 8 bits cost anyway."""
    narrower = narrow("mixtral-8x7b", hidden=256, width=128, precision="w8a8", dtype=jnp.dtype("bfloat16"))
    quantization = Quantization(gradient_dtype="float8_e4m3fn", weights_gradient_dtype=weights_gradient_dtype)
    y, gradients, _ = layer(dataclasses.replace(narrower, quantization=quantization), ep, LONG)
    right = oracle(narrower, quantized=False, shape=LONG)
    _assert_close((y, gradients), right, 0.12 if "e5m2" in weights_gradient_dtype else 8e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*falling back to the XLA reference")  # for float32
@pytest.mark.parametrize(("precision", "dtype"), LIMITS)
@pytest.mark.parametrize("preset", PRESETS)
def test_layer_equals_the_dense_oracle_on_gpus(preset, precision, dtype):
    config = narrow(preset, hidden=256, width=128, precision=precision, dtype=jnp.dtype(dtype))
    check_layer(config, ep=math.gcd(config.num_experts, jax.device_count()))


ON_TPU = MoEConfig(128, 128, 4, 2, 128, dtype=jnp.dtype("bfloat16"), backend="pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), LIMITS)
def test_layer_equals_the_dense_oracle_on_simulated_tpus(precision, dtype):
    with interpreted():
        check_layer(dataclasses.replace(ON_TPU, precision=precision, dtype=jnp.dtype(dtype)), ep=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(gradient_dtype="float8_e4m3fn", weights_gradient_dtype="float8_e4m3fn"),
        Quantization(dtype="int8"),
    ],
    ids=["FP8", "INT8"],
)
def test_training_in_8_bits_on_a_simulated_tpu(quantization):
    """In FP8 both ways, as v7x multiplies, and in INT8 forward alone, as the others do."""
    config = dataclasses.replace(ON_TPU, precision="w8a8", quantization=quantization)
    with interpreted():
        y, gradients, _ = layer(config, 1)
    _assert_close((y, gradients), oracle(config, quantized=False), 8e-2)


def test_values_equal_the_dense_oracles_on_simulated_tpus():
    config = dataclasses.replace(ON_TPU, precision="w8a8")
    params, x, _ = problem(config)
    x = x[:, :13]  # interpreted kernels take their time
    with interpreted():
        y, _ = jax.jit(lambda x, params: moe(x, params, config))(x, params)
    expected = jax.jit(lambda x, params: dense_moe(x, params, config, quantized=True))(x.astype(jnp.float32), params)
    assert relative_error(y, expected) < LIMITS["w8a8", "bfloat16"][0]


def check_layer(config: MoEConfig, ep: int) -> None:
    y, gradients, load = layer(config, ep)
    _, x, _ = problem(config)
    chex.assert_trees_all_equal_shapes_and_dtypes((y, gradients[0]), (x, x))
    assert int(load.dropped) == 0
    assert int(load.tokens_per_expert.sum()) == math.prod(SHAPE) * config.top_k

    on_same_operands, on_float32 = LIMITS[config.precision, config.dtype.name]
    is_8_bit = config.precision == "w8a8"
    _assert_close((y, gradients), oracle(config, is_8_bit), on_same_operands)
    if is_8_bit:
        _assert_close((y, gradients), oracle(config, quantized=False), on_float32)


def _assert_close(got, expected, limit: float) -> None:
    parts, refs = ({"y": y, "dx": dx, "d": dparams} for y, (dx, dparams) in (got, expected))
    pairs = zip(jax.tree.leaves_with_path(parts), jax.tree.leaves(refs), strict=True)
    errors = {jax.tree_util.keystr(path): relative_error(leaf, ref) for (path, leaf), ref in pairs}
    too_large = {name: f"{error:.2e}" for name, error in errors.items() if not error < limit}
    assert not too_large, f"relative errors above {limit}: {too_large}"

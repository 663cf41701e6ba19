"""What the layer keeps under `jax.checkpoint`: gradients stay what they are, and no row travels twice."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from moejax import REMAT_NAMES, MoEConfig, Quantization, make_mesh, moe, remat_policy
from moejax.params import map_table
from tests.helpers import normal, relative_error
from tests.moejax.layers import random_params
from tests.moejax.test_meshes import equations

CONFIG = MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, dtype="float32")
COUNTED = ("all_to_all", "grouped_matmul", "dispatch", "combine")


def gradient_of_two_layers(rng, mesh, tokens=64, **checkpoint):
    """A function of (x, params) and its arguments: two layers one after the other, each under `jax.checkpoint`."""
    params = [random_params(CONFIG, rng) for _ in range(2)]
    x = normal(rng, 4, tokens // 4, CONFIG.hidden_size)

    def block(x, params):
        return x + moe(x, params, CONFIG, mesh=mesh)[0]

    def loss(x, params):
        run = jax.checkpoint(block, **checkpoint) if checkpoint else block
        for own in params:
            x = run(x, own)
        return jnp.square(x).sum()

    return jax.grad(loss, argnums=(0, 1)), (x, params)


def counts(gradient, args) -> dict[str, int]:
    jaxpr = jax.make_jaxpr(gradient)(*args).jaxpr
    return {name: len(equations(jaxpr, name)) for name in COUNTED}


@pytest.mark.parametrize(("ep", "tokens", "exchanges"), [(1, 64, 0), (4, 64, 5), (8, 256, 5 + 8)])
def test_nothing_travels_or_is_multiplied_again(ep, tokens, exchanges, rng):
    """Over 8 chips later rounds, should there be any, do their forward pass again, as their rows are not kept."""
    mesh = make_mesh(ep)
    plain = counts(*gradient_of_two_layers(rng, mesh, tokens))
    kept = counts(*gradient_of_two_layers(rng, mesh, tokens, policy=remat_policy))
    again = counts(*gradient_of_two_layers(rng, mesh, tokens, policy=jax.checkpoint_policies.nothing_saveable))
    # Of each layer: what rows are for, rows out and rows back; and, backwards, the gradients of the last two.
    assert plain["all_to_all"] == 2 * exchanges
    assert kept["all_to_all"] == 2 * exchanges
    if ep == 1:  # whose backward pass sends rows again in any case
        assert again["grouped_matmul"] > plain["grouped_matmul"]
    else:
        assert all(again[name] > plain[name] for name in COUNTED)
    assert kept == plain


@pytest.mark.parametrize("gradient_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("policy", [remat_policy, jax.checkpoint_policies.nothing_saveable], ids=["names", "nothing"])
@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1-names-None")
def test_in_8_bits_too(ep, policy, gradient_dtype, rng):
    """What `jax.checkpoint` keeps it rounds, which numbers in e4m3 do not survive as such."""
    config = MoEConfig(128, 128, 8, 2, precision="w8a8", quantization=Quantization(gradient_dtype=gradient_dtype))
    params, x, mesh = random_params(config, rng), normal(rng, 4, 8, 128), make_mesh(ep)

    def layer(x, params):
        return moe(x, params, config, mesh=mesh)[0]

    def gradient(layer):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.square(layer(*args)).sum(), argnums=(0, 1)))

    plain, again = gradient(layer)(x, params), gradient(jax.checkpoint(layer, policy=policy))(x, params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize(
    ("precision", "factor", "expert_bias"), [("w16a16", 1, False), ("w8a8", 2, False), ("w16a16", 1, True)]
)
def test_one_chip_keeps_no_rows_of_hidden_size(precision, factor, expert_bias):
    """But tokens and the product of gate and up: 2·H + 4·K·I + 64·K bytes in BF16; with 8 bits it is in float32."""
    tokens, hidden, width, experts, k = 128, 384, 128, 16, 4
    config = MoEConfig(hidden, width, experts, k, precision=precision, expert_bias=expert_bias)
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = map_table(lambda row: bf16(row.shape), config)

    def pullback(x, params):
        return jax.vjp(lambda x, params: moe(x, params, config)[0], x, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, bf16((tokens, hidden)), params))
    assert all(leaf.shape != (tokens * k, hidden) for leaf in kept)
    of_tokens = [leaf for leaf in kept if leaf.shape and leaf.shape[0] in (tokens, tokens * k)]
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in of_tokens)
    in_8_bits = hidden + 4 * (hidden // 128) if precision == "w8a8" else 0
    assert num_bytes <= tokens * (2 * hidden + factor * 4 * k * width + 64 * k + in_8_bits)


@pytest.mark.slow
def test_gradients_stay_what_they_are(rng):
    gradient, args = gradient_of_two_layers(rng, make_mesh(4), policy=remat_policy)
    plain, _ = gradient_of_two_layers(rng, make_mesh(4))
    for a, b in zip(jax.tree.leaves(jax.jit(gradient)(*args)), jax.tree.leaves(jax.jit(plain)(*args)), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize(("precision", "gradient_dtype"), [("w16a16", None), ("w8a8", None), ("w8a8", "float8_e4m3fn")])
def test_one_chip_casts_or_rounds_weights_once(precision, gradient_dtype, rng):
    quantization = Quantization(gradient_dtype=gradient_dtype)
    config = MoEConfig(128, 128, 8, 2, precision=precision, quantization=quantization)
    params, x = random_params(config, rng), normal(rng, 32, 128, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, params: moe(x, params, config)[0].sum(), argnums=(0, 1)))(x, params).jaxpr
    named = [each.outvars[0].aval for each in equations(jaxpr, "name") if each.params["name"] == "moe_weights"]
    casts = [aval.shape for aval in named if aval.dtype == jnp.bfloat16]
    assert sorted(casts) == ([(8, 128, 128), (8, 128, 2 * 128)] if precision == "w16a16" else [])
    assert len(equations(jaxpr, "quantize_transpose")) == 2 * (precision == "w8a8")


def test_weights_that_an_fsdp_axis_gathers_in_8_bits_can_be_kept(rng):
    config = MoEConfig(256, 128, 8, 2, precision="w8a8", quantization=Quantization(gradient_dtype="float8_e4m3fn"))
    mesh = jax.make_mesh((2, 1), ("fsdp", "expert"), (AxisType.Auto,) * 2, devices=jax.devices()[:2])
    params, x = random_params(config, rng), normal(rng, 32, 256, dtype=jnp.bfloat16)

    def rounded_times(policy) -> int:
        run = jax.checkpoint(lambda x, params: moe(x, params, config, mesh=mesh)[0].sum(), policy=policy)
        return len(equations(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(x, params).jaxpr, "quantize_transpose"))

    assert rounded_times(jax.checkpoint_policies.save_only_these_names("moe_weights")) == 2
    assert rounded_times(jax.checkpoint_policies.nothing_saveable) == 4


def test_every_name_is_one_of_a_layer(rng):
    gradient, args = gradient_of_two_layers(rng, make_mesh(4))
    names = {equation.params["name"] for equation in equations(jax.make_jaxpr(gradient)(*args).jaxpr, "name")}
    assert set(REMAT_NAMES) <= names

"""A layer's output added to a residual: by whatever way the layer takes, it is the sum of the two."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import (
    MoE,
    MoEConfig,
    Partition,
    Perft,
    Quantization,
    TopKRouter,
    experts,
    fused_experts,
    make_mesh,
    moe,
    moe_experts,
    quantize_params,
)
from moejax.routers import ChainRouter, ExpertChoiceRouter, SoftRouter
from pallas_kernels.quantize import quantize
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import random_params

CONFIG = MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, dtype=jnp.float32)
CONFIGS = {
    "routed": CONFIG,
    "shared": dataclasses.replace(CONFIG, shared_intermediate_size=16, shared_gate=True),
    "biases": dataclasses.replace(CONFIG, expert_bias=True),
    "expert choice": dataclasses.replace(CONFIG, router=ExpertChoiceRouter()),
    "chain": dataclasses.replace(CONFIG, router=ChainRouter(passes=2)),
    "soft": dataclasses.replace(CONFIG, router=SoftRouter()),
}


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.quick("shared-4", "chain-1")
def test_values_and_gradients_are_those_of_the_sum(name, ep, rng):
    config, mesh = CONFIGS[name], make_mesh(ep) if ep > 1 else None
    params = random_params(config, rng)
    x, residual, direction = (normal(rng, 4, 8, 32) for _ in range(3))

    def inside(x, params, residual):
        return moe(x, params, config, residual=residual, mesh=mesh)[0]

    def outside(x, params, residual):
        return residual + moe(x, params, config, mesh=mesh)[0]

    results = []
    for layer in (inside, outside):
        y, pull = jax.vjp(jax.jit(layer), x, params, residual)
        results.append((y, pull(direction), jax.jit(layer)(x, params, residual)))
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("partition", [Partition(), Partition(expert=None, mlp="expert")], ids=["expert", "tensor"])
def test_weights_in_8_bits_and_a_residual_that_is_rounded_once(partition, rng):
    config = dataclasses.replace(
        CONFIG,
        dtype=jnp.bfloat16,
        precision="w8a8",
        quantization=Quantization("float8_e4m3fn", "per_row", "per_channel"),
    )
    params = quantize_params(random_params(config, rng), config)
    x, residual = normal(rng, 16, 32, dtype="bfloat16"), 100 * normal(rng, 16, 32)

    @functools.partial(jax.jit, static_argnames="mesh")
    def layer(x, residual, mesh):
        return moe(x, params, config, residual=residual, mesh=mesh, partition=None if mesh is None else partition)[0]

    for mesh in (None, make_mesh(2)):
        y, alone = layer(x, residual, mesh), layer(x, None, mesh)
        assert y.dtype == jnp.bfloat16
        assert relative_error(y, float64(residual) + float64(alone)) < LIMIT["bfloat16"]


@pytest.mark.parametrize("name", ["routed", "shared", "soft"])
@pytest.mark.quick("shared")
def test_a_residual_of_more_bits_keeps_them(name, rng):
    """Experts compute in BF16, and the stream that they are added to is float32."""
    config = dataclasses.replace(CONFIGS[name], dtype=jnp.bfloat16)
    params, x, residual = random_params(config, rng), normal(rng, 2, 8, 32), 100 * normal(rng, 2, 8, 32)

    @jax.jit
    def layer(x, residual):
        return moe(x, params, config, residual=residual)[0]

    y, alone = layer(x, residual), layer(x, None)
    assert y.dtype == jnp.float32
    assert relative_error(y - residual, alone) < LIMIT["bfloat16"]


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.quick("1")
def test_the_sum_is_not_rounded_before_the_residual_is_added(ep, rng):
    config, mesh = dataclasses.replace(CONFIG, dtype=jnp.bfloat16), make_mesh(ep) if ep > 1 else None
    params, x = random_params(config, rng), normal(rng, 16, 32, dtype="bfloat16")

    def served(x, residual):
        return moe(x, params, config, residual=residual, mesh=mesh)[0]

    def trained(x, residual):
        return jax.vjp(lambda x: served(x, residual), x)[0]

    for layer in (jax.jit(served), jax.jit(trained)):
        alone = layer(x, None).astype(jnp.float32)
        lost = abs(float64(layer(x, -alone)))  # zeros if the sum was rounded first
        assert 0 < lost.max() < 2**-8 * abs(alone).max()


def test_the_kernel_for_few_tokens_gets_it(monkeypatch, rng):
    quantization = Quantization("float8_e4m3fn", "per_row", "per_channel")
    config = dataclasses.replace(CONFIG, precision="w8a8", quantization=quantization)
    params = quantize_params(random_params(config, rng), config)
    w1, w2 = (quantize(normal(rng, *shape), scaling="per_channel").mT for shape in ((8, 32, 32), (8, 16, 32)))
    x, residual = normal(rng, 4, 32), normal(rng, 4, 32)
    chosen = jnp.ones((4, 2)), jnp.asarray(rng.integers(0, 8, (4, 2)), jnp.int32)

    def layer(residual):
        return moe(x, params, config, residual=residual)[0]

    def fused(residual):
        return fused_experts(x, w1, w2, *chosen, residual=residual, quantization=quantization)

    monkeypatch.setattr(experts, "pays", lambda *_: True)
    jax.clear_caches()
    try:
        for run in (layer, fused):
            assert "routed_mlp" in str(jax.make_jaxpr(run)(residual))
            assert relative_error(run(residual), float64(residual) + float64(run(None))) < 1e-5
    finally:
        jax.clear_caches()


class Doubled(TopKRouter):
    """A router of someone's own, which knows nothing of a residual."""

    def apply(self, x, params, config, tokens, given, experts):
        assert given.residual is None
        y, outcome = super().apply(x, params, config, tokens, given, experts)
        return 2 * y, outcome


def test_a_router_that_does_it_all_itself_need_not_know_of_it(rng):
    config = dataclasses.replace(CONFIG, router=Doubled())
    params, x, residual = random_params(config, rng), normal(rng, 6, 32), normal(rng, 6, 32)
    y = moe(x, params, config, residual=residual)[0]
    assert relative_error(y, residual + 2 * float64(moe(x, params, CONFIG)[0])) < LIMIT["float32"]


def test_adapters_take_one(rng):
    layer = Perft(MoE(CONFIG, rngs=nnx.Rngs(0)), num_adapters=2, width=4, top_k=1, rngs=nnx.Rngs(1))
    layer.up[...] = normal(rng, *layer.up.shape)
    x, residual = normal(rng, 6, 32), normal(rng, 6, 32)
    assert relative_error(layer(x, residual=residual)[0], residual + layer(x)[0]) < LIMIT["float32"]


def test_where_one_chip_has_all_experts_the_sum_over_them_adds_it(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 16, 32)

    def layer(x):
        return moe(x, params, CONFIG, residual=x)[0]

    assert "combine_onto" in str(jax.make_jaxpr(layer)(x))
    assert "combine_onto" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(x))


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1")
def test_what_is_masked_comes_out_as_zeros(ep, rng):
    mesh, mask = make_mesh(ep) if ep > 1 else None, jnp.arange(8) % 3 != 1
    params, x = random_params(CONFIG, rng), normal(rng, 8, 32)
    residual = jnp.where(mask[:, None], normal(rng, 8, 32), jnp.nan)
    y = jax.jit(lambda x: moe(x, params, CONFIG, residual=residual, mask=mask, mesh=mesh)[0])(x)
    alone = jax.jit(lambda x: moe(x, params, CONFIG, mask=mask, mesh=mesh)[0])(x)
    assert relative_error(y[mask], (residual + alone)[mask]) < LIMIT["float32"]
    assert not np.asarray(y)[~np.asarray(mask)].any()


def test_the_module_the_experts_and_fused_experts_take_one(rng):
    layer, x, residual = MoE(CONFIG, rngs=nnx.Rngs(0)), normal(rng, 6, 32), normal(rng, 6, 32)
    y, aux = layer(x, residual=residual)
    assert same_bits(y, moe(x, layer.params(), CONFIG, residual=residual)[0])
    chosen, _ = moe_experts(x, aux.topk_weights, aux.topk_ids, layer.params(), CONFIG, residual=residual)
    assert relative_error(chosen, y) < LIMIT["float32"]
    w1 = layer.gate_up[...].reshape(8, 32, 32).mT
    fused = fused_experts(x, w1, layer.down[...].mT, aux.topk_weights, aux.topk_ids, residual=residual)
    assert relative_error(fused, y) < LIMIT["float32"]


def test_one_that_does_not_fit_is_refused(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 6, 32)
    for residual in (jnp.ones((6, 31)), jnp.ones((3, 32)), jnp.ones((6, 32), jnp.int32)):
        with raises_saying(ValueError, "residual", "[6, 32]", f"{residual.dtype}{list(residual.shape)}"):
            moe(x, params, CONFIG, residual=residual)
    with raises_saying(TypeError, "residual must be an array, got float"):
        moe(x, params, CONFIG, residual=1.0)

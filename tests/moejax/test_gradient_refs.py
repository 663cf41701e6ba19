"""Gradients of a layer's weights that are added to refs, as `pullback.with_refs` of jax.vjp asks for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import MoEConfig, Quantization, moe, quantize_for_training, quantize_params
from tests.helpers import added_in_refs, additions_to_refs, normal, relative_error, same_bits
from tests.moejax.layers import random_params

IN_8_BITS = {
    "precision": "w8a8",
    "quantization": Quantization(gradient_dtype="float8_e4m3fn", weights_gradient_dtype="float8_e4m3fn"),
}
CONFIGS = {
    "16 bits": MoEConfig(256, 128, 8, 2),
    "8 bits": MoEConfig(256, 128, 8, 2, **IN_8_BITS),
    "forward in 8 bits": MoEConfig(256, 128, 8, 2, precision="w8a8"),
    "biases": MoEConfig(256, 128, 8, 2, expert_bias=True),
}


def loss(params, x, config, rounded=None, mesh=None):
    y, aux = moe(x, params, config, rounded=rounded, mesh=mesh)
    return jnp.square(y.astype(jnp.float32)).sum() + aux.loss


def added_by_jax(params, batches, config, **options):
    """The sum of the gradients of all batches."""

    def add(total, x):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x, config, **options)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]


def in_refs(params, batches, config, wrap=lambda function: function, **options):
    sums = jax.tree.map(lambda w: jax.new_ref(jnp.zeros_like(w)), params)

    def add(_, x):
        value, pullback = jax.vjp(wrap(lambda params: loss(params, x, config, **options)), params)
        pullback.with_refs(sums)(jnp.ones_like(value))
        return None, None

    jax.lax.scan(add, None, batches)
    return jax.tree.map(jax.freeze, sums)


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_have_the_same_bits(rng, name):
    config, batches = CONFIGS[name], normal(rng, 3, 24, 256, dtype="bfloat16")
    params = random_params(config, rng)
    if config.precision == "w16a16":
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    rounded = quantize_for_training(params, config) if name == "8 bits" else None
    run = functools.partial(in_refs, config=config)
    by_jax = jax.jit(functools.partial(added_by_jax, config=config))(params, batches, rounded=rounded)
    assert same_bits(jax.jit(run)(params, batches, rounded=rounded), by_jax)


@pytest.mark.parametrize("name", CONFIGS)
def test_jax_adds_routers_and_biases(rng, name):
    config, batches = CONFIGS[name], normal(rng, 3, 24, 256, dtype="bfloat16")
    params = random_params(config, rng)
    rounded = quantize_for_training(params, config) if name == "8 bits" else None
    run = functools.partial(in_refs, config=config, rounded=rounded)
    assert additions_to_refs(run, params, batches) == (3 if name == "biases" else 1)


def test_stacked_layers(rng):
    """As `nnx.scan` has them, with a part of a ref for each."""
    config, x = CONFIGS["8 bits"], normal(rng, 24, 256, dtype="bfloat16")
    params = jax.tree.map(lambda *layers: jnp.stack(layers), *(random_params(config, rng) for _ in range(2)))

    def deep(params):
        y = jax.lax.scan(lambda x, params: (moe(x, params, config)[0], None), x, params)[0]
        return jnp.square(y.astype(jnp.float32)).sum()

    start = jax.tree.map(lambda w: normal(rng, *w.shape), params)
    run = functools.partial(added_in_refs, deep, cotangent=jnp.float32(1), sums=start)
    plain = jax.jit(jax.grad(deep))(params)
    assert same_bits(jax.jit(run)(params), jax.tree.map(jnp.add, start, plain))
    assert additions_to_refs(run, params) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["16 bits", "8 bits"])
def test_sums_have_the_same_bits_on_a_gpu(rng, name):
    config, batches = CONFIGS[name], normal(rng, 3, 200, 256, dtype="bfloat16")
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), random_params(config, rng))
    options = {"config": dataclasses.replace(config, backend="pallas_gpu")}
    by_jax, by_kernels = (jax.jit(functools.partial(f, **options))(params, batches) for f in (added_by_jax, in_refs))
    assert same_bits(by_kernels, by_jax)


def test_weights_that_are_cast_keep_more_digits(rng):
    """Products take BF16, and refs of float32 the sums of these; a gradient by itself is one of BF16."""
    config, x = CONFIGS["16 bits"], normal(rng, 1, 24, 256, dtype="bfloat16")
    params = random_params(config, rng)
    cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)
    exact = jax.jit(functools.partial(added_by_jax, config=dataclasses.replace(config, dtype=jnp.float32)))(
        dataclasses.replace(cast, router=params.router), x.astype(jnp.float32)
    )
    by_jax, by_kernels = (jax.jit(functools.partial(f, config=config))(params, x) for f in (added_by_jax, in_refs))
    assert same_bits(by_kernels.down.astype(jnp.bfloat16), by_jax.down.astype(jnp.bfloat16))
    assert not same_bits(by_kernels.down, by_jax.down)
    assert relative_error(by_kernels.down, np.asarray(exact.down)) < relative_error(by_jax.down, np.asarray(exact.down))


def test_under_checkpoint_jax_adds(rng):
    config, batches = CONFIGS["8 bits"], normal(rng, 2, 24, 256, dtype="bfloat16")
    params = random_params(config, rng)
    again = functools.partial(in_refs, config=config, wrap=jax.checkpoint)
    by_jax = jax.jit(functools.partial(added_by_jax, config=config))(params, batches)
    assert same_bits(jax.jit(again)(params, batches), by_jax)
    assert additions_to_refs(again, params, batches) == 3


def test_a_ref_for_some_weights_alone(rng):
    """Others come back; weights in 8 bits have no gradient."""
    config, x = CONFIGS["8 bits"], normal(rng, 24, 256, dtype="bfloat16")
    params = random_params(config, rng)
    frozen = dataclasses.replace(params, gate_up=quantize_params(params, config).gate_up)

    def gradients(params, down):
        def of_these(router, down):
            return loss(dataclasses.replace(params, router=router, down=down), x, config)

        value, pullback = jax.vjp(of_these, params.router, params.down)
        ref = jax.new_ref(down)
        given = jax.tree.map(lambda _: jax.ad.GradValue(), params.router)
        of_router, _ = pullback.with_refs(given, ref)(jnp.ones_like(value))
        return of_router, jax.freeze(ref)

    start = normal(rng, *params.down.shape)
    of_router, total = jax.jit(gradients)(frozen, start)
    of_both = jax.grad(lambda both, params: loss(dataclasses.replace(params, router=both[0], down=both[1]), x, config))
    plain = jax.jit(of_both)((params.router, params.down), frozen)
    assert same_bits((of_router, total), (plain[0], start + plain[1]))


def test_layers_that_share_weights_add_twice(rng):
    config, x = CONFIGS["8 bits"], normal(rng, 24, 256, dtype="bfloat16")
    params = random_params(config, rng)

    def twice(params):
        y, _ = moe(x, params, config)
        return jnp.square(moe(y, params, config)[0].astype(jnp.float32)).sum()

    zeros = jax.tree.map(jnp.zeros_like, params)
    total = jax.jit(functools.partial(added_in_refs, twice))(params, jnp.float32(1), zeros)
    assert same_bits(total, jax.jit(jax.grad(twice))(params))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_experts_of_a_mesh(rng, kind):
    """Of weights that all axes of several chips split; for the router, which no axis does, JAX has no refs."""
    config, x = CONFIGS["8 bits"], normal(rng, 24, 256, dtype="bfloat16")
    mesh = jax.make_mesh((1, 4), ("data", "expert"), (kind,) * 2, devices=jax.devices()[:4])
    params = random_params(config, rng)
    split = jax.device_put(
        {"gate_up": params.gate_up, "down": params.down}, NamedSharding(mesh, PartitionSpec("expert"))
    )
    params = dataclasses.replace(params, **split)

    def in_refs(params):
        refs = jax.tree.map(lambda w: jax.new_ref(jnp.zeros_like(w)), params)
        value, pullback = jax.vjp(lambda params: loss(params, x, config, mesh=mesh), params)
        router = jax.tree.map(lambda _: jax.ad.GradValue(), params.router)
        found = pullback.with_refs(dataclasses.replace(refs, router=router))(jnp.ones_like(value))[0]
        return dataclasses.replace(jax.tree.map(jax.freeze, refs), router=found.router)

    with jax.set_mesh(mesh):
        ours, plain = (
            jax.jit(in_refs)(params),
            jax.jit(jax.grad(functools.partial(loss, config=config, mesh=mesh)))(params, x),
        )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert relative_error(a, np.asarray(b)) < 1e-6

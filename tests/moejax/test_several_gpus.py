"""A layer over the GPUs of one process, two or more: each transport against one GPU and the dense oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moejax import MoEConfig, dense_moe, moe
from moejax.axes import axes_on
from moejax.params import MoEParams, param_specs
from sharding.mesh import make_mesh
from tests.helpers import normal, relative_error, same_bits
from tests.moejax.layers import clear_cut_tokens, random_params

pytestmark = pytest.mark.gpu
TOKENS = 128
LIMITS = {"w16a16": 1e-2, "w8a8": 8e-2}
"""Against the dense oracle in float32, which rounds nothing."""


@pytest.fixture(scope="module", autouse=True)
def chips():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs or more")
    return jax.device_count()


def config_of(precision: str, *, top_k: int = 4) -> MoEConfig:
    return MoEConfig(hidden_size=512, intermediate_size=256, num_experts=16, top_k=top_k, precision=precision)


@functools.cache
def problem(config: MoEConfig) -> tuple[MoEParams, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    params = random_params(config, rng)
    x = clear_cut_tokens(TOKENS, config, params, rng)
    return params, x, normal(rng, *x.shape)


def results(config: MoEConfig, mesh, *, remat: bool = False):
    """y, and the gradients for tokens and parameters, on a mesh or on one chip."""
    params, x, direction = problem(dataclasses.replace(config, transport="auto"))
    if mesh is not None:
        specs = param_specs(params, config, axes_on(mesh, None, config))
        params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)

    def layer(x, params):
        return moe(x, params, config, mesh=mesh)[0]

    def loss(x, params):
        y = (jax.checkpoint(layer) if remat else layer)(x, params)
        return (y.astype(jnp.float32) * direction).sum(), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params)


def meshes(chips: int) -> list[jax.sharding.Mesh]:
    return [make_mesh(chips), *([make_mesh(2, 2)] if chips >= 4 else [])]


@pytest.mark.parametrize("transport", ["dense", "remote"])
@pytest.mark.parametrize("precision", LIMITS)
def test_values_and_gradients(precision, transport, chips):
    config = dataclasses.replace(config_of(precision), transport=transport)
    params, x, direction = problem(config_of(precision))
    one = results(config, None)

    def oracle(x, params):
        plain = dataclasses.replace(config, precision="w16a16")
        y = dense_moe(x, params, plain)
        return (y * direction).sum(), y

    true = jax.jit(jax.grad(oracle, argnums=(0, 1), has_aux=True))(x.astype(jnp.float32), params)
    for mesh in meshes(chips):
        found = results(config, mesh)
        for a, b, c in zip(*map(jax.tree.leaves, (found, one, true)), strict=True):
            assert relative_error(a, b) < 1e-2
            assert relative_error(a, c) < LIMITS[precision]


@pytest.mark.parametrize("precision", LIMITS)
def test_every_run_gives_equal_bits_and_remat_equal_gradients(precision, chips):
    config = dataclasses.replace(config_of(precision), transport="remote")
    first, second, again = (results(config, make_mesh(chips), remat=remat) for remat in (False, False, True))
    for a, b, c in zip(*map(jax.tree.leaves, (first, second, again)), strict=True):
        assert same_bits(a, b)
        assert relative_error(c, a) < 1e-3


def test_two_layers_of_unlike_shapes_in_a_loop(chips, rng):
    """Their exchanges are alive in one program, and run in turn. Choices are given, so that rounding changes none."""
    configs = [config_of("w8a8"), config_of("w16a16", top_k=2)]
    ids = [jnp.asarray(rng.integers(0, 16, (TOKENS, config.top_k)), jnp.int32) for config in configs]
    params, mesh = [problem(config)[0] for config in configs], make_mesh(chips)

    def model(transport):
        def layers(x, _):
            for config, own, chosen in zip(configs, params, ids, strict=True):
                x += moe(x, own, dataclasses.replace(config, transport=transport), topk_ids=chosen, mesh=mesh)[0]
            return x, None

        return jax.jit(lambda x: jax.lax.scan(jax.checkpoint(layers), x, None, 3)[0])(problem(configs[0])[1])

    assert relative_error(model("remote"), model("dense")) < 1e-3

"""What `moe` makes of inputs that are wrong, strange, or spread in other ways than usual."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import MoEConfig, make_mesh, moe
from tests.helpers import normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import random_params

CONFIG = MoEConfig(
    hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, shared_intermediate_size=16, dtype=jnp.float32
)


@pytest.fixture
def params(rng):
    return random_params(CONFIG, rng)


def with_nan(rng) -> jax.Array:
    return normal(rng, 6, 32).at[2, 5].set(jnp.nan)


@pytest.mark.parametrize("ep", [1, 4])
def test_nan_is_refused_where_it_can_be_seen(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    with raises_saying(ValueError, "x holds NaN in 1 of 6 tokens", "first: token 2"):
        moe(with_nan(rng), params, CONFIG, mesh=mesh)
    x = with_nan(rng)
    with raises_saying(ValueError, "x holds NaN in 1 of 6 tokens"):  # a constant of the traced function
        jax.jit(lambda params: moe(x, params, CONFIG, mesh=mesh))(params)


@pytest.mark.parametrize("ep", [1, 4])
def test_nan_under_jit_stays_with_its_token(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    y, _ = jax.jit(lambda x: moe(x, params, CONFIG, mesh=mesh))(with_nan(rng))
    np.testing.assert_array_equal(np.isnan(y).any(1), np.arange(6) == 2)


def test_a_router_that_makes_nan_is_refused_where_it_can_be_seen(params, rng):
    broken = dataclasses.replace(params, router_kernel=params.router_kernel.at[3, 1].set(jnp.nan))
    with raises_saying(ValueError, "logits of 6 of 6 tokens are NaN", "router's kernel"):
        moe(normal(rng, 6, 32), broken, CONFIG)


def test_layers_that_are_alike_are_traced_once(params, rng):
    """Kernels take long to lower: a model of many layers must not lower each anew."""

    def model(x, layers):
        for layer in layers:
            x = x + moe(x, layer, CONFIG)[0]
        return x.sum()

    def programs(jaxpr) -> list:
        """Those that each layer runs, by identity."""
        return [id(e.params["jaxpr"]) for e in jaxpr.eqns if "on_chip" in str(e.params.get("name"))]

    for function in (model, jax.grad(model)):
        found = programs(jax.make_jaxpr(function)(normal(rng, 6, 32), [params] * 5).jaxpr)
        assert len(found) >= 5
        assert len(found) / len(set(found)) == 5


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (np.ones((4, 32), np.int32), ("x must be BF16, FP16 or float32", "got int32", "embed token ids first")),
        (np.ones((4, 31), np.float32), ("x must be [..., H] with hidden_size=32", "got [4, 31]")),
        (np.ones((0, 32), np.float32), ("x must hold at least one token", "got [0, 32]")),
    ],
)
def test_inputs_that_do_not_fit(x, parts, params):
    with raises_saying(ValueError, *parts):
        moe(jnp.asarray(x), params, CONFIG)


def test_a_mesh_without_the_axis_is_refused(params, rng):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    with raises_saying(ValueError, "the mesh has no axis 'expert', only ('data', 'model')", "expert_axis="):
        moe(normal(rng, 8, 32), params, CONFIG, mesh=mesh)


def test_axes_of_any_name(params, rng):
    mesh = jax.make_mesh((2, 4), ("replica", "model"), (jax.sharding.AxisType.Auto,) * 2)
    x = normal(rng, 2, 9, 32)
    expected, _ = moe(x, params, CONFIG)
    y, aux = moe(x, params, CONFIG, mesh=mesh, expert_axis="model", token_axes=("replica", "model"))
    assert relative_error(y, expected) < 1e-5
    assert int(aux.load.tokens_per_expert.sum()) == 18 * CONFIG.top_k


def test_one_vector_is_one_token(params, rng):
    x = normal(rng, 3, 32)
    y, _ = moe(x[1], params, CONFIG)
    assert relative_error(y, moe(x, params, CONFIG)[0][1]) < 1e-5


@pytest.mark.parametrize("ep", [1, 8])
def test_equal_inputs_give_equal_bits(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    x = normal(rng, 57, 32)
    step = jax.jit(jax.value_and_grad(lambda x, params: moe(x, params, CONFIG, mesh=mesh)[0].sum(), argnums=(0, 1)))
    assert same_bits(step(x, params), step(x, params))


@pytest.mark.parametrize("ep", [1, 4])
def test_capacity_drops_are_counted_and_add_nothing(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    x = jnp.broadcast_to(normal(rng, 1, 32), (16, 32))  # every token wants the same two experts
    config = dataclasses.replace(CONFIG, capacity_factor=1.0, shared_intermediate_size=0)
    params = dataclasses.replace(params, shared_gate_up=None, shared_down=None)
    y, aux = moe(x, params, config, mesh=mesh)
    per_chip = 16 // ep
    capacity = -(-per_chip * 2 // 8)
    assert int(aux.load.dropped) == ep * 2 * (per_chip - capacity)
    assert sorted(np.flatnonzero(aux.load.dropped_per_expert)) == sorted(np.flatnonzero(aux.load.tokens_per_expert))
    kept = np.abs(np.asarray(y)).reshape(ep, per_chip, 32).sum(2) > 0
    np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(per_chip) < capacity, (ep, per_chip)))

"""Choices of one pass made again in another: ids forced, weights live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import ROUTERS, MoE, MoEConfig, TopKRouter, make_mesh, moe, with_changes
from tests.helpers import normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import random_params

CONFIG = MoEConfig(
    hidden_size=32, intermediate_size=16, num_experts=8, top_k=3, router=TopKRouter(z_loss=0.1), dtype=jnp.float32
)
REPLAYING = ["softmax", "noisy_top_k", "switch", "loss_free", "group_limited", "chain_of_experts", "specialized"]


def test_every_router_replays_or_refuses():
    assert [name for name in ROUTERS if ROUTERS[name](CONFIG).router.replays] == REPLAYING


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize("name", REPLAYING)
@pytest.mark.slow
def test_the_same_choices_give_the_same_result(name, ep, rng):
    layer = MoE(
        ROUTERS[name](CONFIG),
        rngs=nnx.Rngs(params=0, router=1),
        mesh=make_mesh(ep) if ep > 1 else None,
        deterministic=True,
    )
    x = normal(rng, 2, 6, 32)
    y, aux = layer(x)
    z, again = layer(x, topk_ids=aux.topk_ids)
    assert same_bits(again.topk_ids, aux.topk_ids)
    assert relative_error(again.topk_weights, aux.topk_weights) < 1e-6
    assert relative_error(z, y) < 1e-6


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.quick("softmax")
def test_forced_choices_have_live_weights_and_gradients(scoring, rng):
    """The weights of the forced experts are what a router that could choose no others would give them."""
    config = with_changes(CONFIG, scoring=scoring)
    params = random_params(config, rng)
    x, direction = normal(rng, 10, 32), normal(rng, 10, 32)
    ids = jnp.asarray(rng.permuted(np.tile(np.arange(8), (10, 1)), axis=1)[:, :3])

    def ours(params):
        y, aux = moe(x, params, config, topk_ids=ids)
        return (y * direction).sum(), (y, aux)

    def theirs(params):
        logits = jnp.dot(x, params.router["kernel"], precision="highest")
        scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}.get(
            scoring, lambda logits: jnp.sqrt(jax.nn.softplus(logits))
        )(logits)
        weights = jnp.take_along_axis(scores, ids, axis=1)
        weights /= weights.sum(1, keepdims=True)
        gate_up = jnp.einsum("th,tkhji->tkji", x, params.gate_up[ids], precision="highest")
        h = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        y = jnp.einsum("tki,tkih,tk->th", h, params.down[ids], weights, precision="highest")
        return (y * direction).sum(), y

    got, (y, aux) = jax.jit(jax.grad(ours, has_aux=True))(params)
    expected, expected_y = jax.jit(jax.grad(theirs, has_aux=True))(params)
    assert same_bits(aux.topk_ids, ids.astype(jnp.int32))
    assert relative_error(y, expected_y) < 1e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.slow
def test_minus_one_leaves_the_choice_to_the_router(rng):
    params = random_params(CONFIG, rng)
    x = normal(rng, 10, 32)
    _, free = moe(x, params, CONFIG)
    worst = jnp.argsort(jnp.dot(x, params.router["kernel"], precision="highest"), axis=1)[:, :1].astype(jnp.int32)
    asked = jnp.concatenate([jnp.full((10, 1), -1), worst, jnp.full((10, 1), -1)], axis=1)
    _, aux = moe(x, params, CONFIG, topk_ids=asked)
    np.testing.assert_array_equal(aux.topk_ids[:, 1], worst[:, 0])
    np.testing.assert_array_equal(aux.topk_ids[:, 0], free.topk_ids[:, 0])
    np.testing.assert_array_equal(aux.topk_ids[:, 2], free.topk_ids[:, 1])
    _, all_free = moe(x, params, CONFIG, topk_ids=jnp.full((10, 3), -1))
    assert same_bits(all_free.topk_ids, free.topk_ids)


def test_minus_one_leaves_the_choice_to_the_router_however_far_apart_logits_are(rng):
    """The softmax of most of them is 0."""
    config = MoEConfig(16, 8, 16, 4)
    logits = (200 * normal(rng, 64, 16)).at[:, 5].set(-jnp.inf)
    free = config.router.choose(logits, config)
    given = free.topk_ids.at[:, ::2].set(-1)
    again = config.router.choose(logits, config, topk_ids=given)
    np.testing.assert_array_equal(jnp.sort(again.topk_ids), jnp.sort(free.topk_ids))
    with_lowest = config.router.choose(logits, config, topk_ids=jnp.full_like(given, -1).at[:, 0].set(5))
    np.testing.assert_array_equal(with_lowest.topk_ids[:, 1:], free.topk_ids[:, :3])


@pytest.mark.parametrize("name", ["softmax", "noisy_top_k"])
@pytest.mark.quick("softmax")
def test_a_choice_that_is_forced_is_not_made_twice(name, rng):
    config = ROUTERS[name](CONFIG)
    params = random_params(config, rng)
    x = normal(rng, 10, 32)
    _, free = moe(x, params, config)
    asked = jnp.full((10, 3), -1).at[:, 2].set(free.topk_ids[:, 0])
    _, aux = moe(x, params, config, topk_ids=asked)
    assert all(len(set(row)) == 3 for row in aux.topk_ids.tolist())
    np.testing.assert_array_equal(aux.topk_ids[:, :2], free.topk_ids[:, 1:])


def test_choices_that_do_not_fit(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 4, 32)
    with raises_saying(ValueError, "topk_ids must be below num_experts=8", "−1 where the router chooses", "got 8"):
        moe(x, params, CONFIG, topk_ids=jnp.full((4, 3), 8))
    with raises_saying(ValueError, "topk_ids must be integers of shape [4, 3]", "int32[4, 2]"):
        moe(x, params, CONFIG, topk_ids=jnp.zeros((4, 2), jnp.int32))
    layer = MoE(ROUTERS["expert_choice"](CONFIG), rngs=nnx.Rngs(0))
    with raises_saying(ValueError, "topk_ids cannot be given", "ExpertChoiceRouter"):
        layer(x, topk_ids=jnp.zeros((4, 8), jnp.int32))


@pytest.mark.slow
def test_ids_of_unsigned_types(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 4, 32)
    _, aux = moe(x, params, CONFIG)
    _, again = moe(x, params, CONFIG, topk_ids=aux.topk_ids.astype(jnp.uint8))
    assert same_bits(again.topk_ids, aux.topk_ids)
    capped = dataclasses.replace(CONFIG, capacity_factor=0.5)
    _, aux = moe(x, params, capped)
    _, again = moe(x, params, capped, topk_ids=aux.topk_ids.astype(jnp.uint16))
    assert same_bits(again.load, aux.load)


def test_ids_of_no_expert_leave_the_choice_to_the_router_where_they_are_not_known(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 4, 32)
    _, free = moe(x, params, CONFIG)
    _, aux = jax.jit(lambda ids: moe(x, params, CONFIG, topk_ids=ids))(jnp.array([[99, 8, -5]] * 4))
    assert same_bits(aux.topk_ids, free.topk_ids)


@pytest.mark.slow
def test_choices_under_noise_have_the_weights_that_they_had(rng):
    config = ROUTERS["noisy_top_k"](CONFIG)
    params, x, key = random_params(config, rng), normal(rng, 6, 32), jax.random.key(3)
    _, aux = moe(x, params, config, key=key)
    _, again = moe(x, params, config, key=key, topk_ids=aux.topk_ids)
    _, quiet = moe(x, params, config)
    assert relative_error(again.topk_weights, aux.topk_weights) < 1e-6
    assert not same_bits(quiet.topk_ids, aux.topk_ids)


def test_a_forced_choice_that_repeats_counts_each_time(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 16, 32)
    config = dataclasses.replace(CONFIG, capacity_factor=0.25)
    _, aux = moe(x, params, config, topk_ids=jnp.zeros((16, 3), jnp.int32))
    assert aux.load.tokens_per_expert.tolist() == [48, 0, 0, 0, 0, 0, 0, 0]
    assert int(aux.load.dropped) == 48 - 2  # room for ⌈0.25 · 16 · 3 / 8⌉

"""What the factories set, the state that no gradient trains, and calls that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import ROUTERS, MoEAux, MoEConfig, RoutedMoE, Router, RouterState
from moejax.losses import LoadStats
from moejax.routers.group_limited import default_groups
from moejax.routers.hash import hash_table
from tests.helpers import normal, raises_saying, same_bits
from tests.moejax.routers.layers import inference, new_layer

CONFIG = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=8, top_k=2, dtype=jnp.float32)


training = nnx.jit(lambda layer, x: layer(x, train=True))


def layer_of(name, rngs=None, **changes):
    return ROUTERS[name](dataclasses.replace(CONFIG, **changes), rngs=rngs or nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("softmax", {"load_balance_loss": 0.01, "scoring": "softmax", "capacity_factor": None}),
        ("noisy_top_k", {"load_balance_loss": 0.1, "normalize_topk": True}),
        ("switch", {"load_balance_loss": 0.01, "capacity_factor": 1.25, "top_k": 1, "normalize_topk": False}),
        ("loss_free", {"load_balance_loss": 0.0, "sequence_balance_loss": 1e-4, "scoring": "sigmoid"}),
        ("group_limited", {"sequence_balance_loss": 1e-4, "num_groups": 4, "topk_groups": 2}),
        ("expert_choice", {"load_balance_loss": 0.0, "capacity_factor": None}),
        ("chain_of_experts", {"load_balance_loss": 0.01, "top_k": 1}),
        ("specialized", {"load_balance_loss": 0.01}),
    ],
)
def test_defaults(name, settings):
    """From a configuration made for another router."""
    config = layer_of(name, scoring="sigmoid", correction_bias=True).config
    assert {key: getattr(config, key) for key in settings} == settings


def test_what_the_configuration_sets_comes_first():
    assert layer_of("softmax", load_balance_loss=0.3).config.load_balance_loss == 0.3
    assert layer_of("switch", capacity_factor=2.0).config.capacity_factor == 2.0
    assert layer_of("loss_free", sequence_balance_loss=0.2).config.sequence_balance_loss == 0.2
    assert layer_of("expert_choice", capacity_factor=2.0).router.capacity_factor == 2.0
    grouped = layer_of("group_limited", num_groups=2, topk_groups=1).config
    assert (grouped.num_groups, grouped.topk_groups) == (2, 1)


@pytest.mark.parametrize(
    ("experts", "top_k", "groups"), [(64, 8, (8, 4)), (16, 2, (8, 4)), (8, 2, (4, 2)), (4, 3, (2, 2)), (6, 1, (2, 1))]
)
def test_default_groups(experts, top_k, groups):
    assert default_groups(experts, top_k) == groups


def test_experts_that_make_no_groups():
    with raises_saying(ValueError, "num_experts=7 does not divide into 8, 4 or 2 groups", "set num_groups"):
        layer_of("group_limited", num_experts=7)


def aux_with(load) -> MoEAux:
    return MoEAux({}, LoadStats(jnp.asarray(load, jnp.int32), jnp.zeros(8, jnp.int32)))


@pytest.mark.parametrize("name", ["loss_free", "group_limited"])
def test_update_moves_the_bias_against_the_load(name):
    layer = ROUTERS[name](CONFIG, rngs=nnx.Rngs(0), update_rate=0.25)
    assert isinstance(layer.router.bias, RouterState)
    nnx.jit(lambda layer, aux: layer.update(aux))(layer, aux_with([6, 0, 3, 3, 3, 4, 2, 3]))
    np.testing.assert_array_equal(layer.router.bias[...], [-0.25, 0.25, 0, 0, 0, -0.25, 0.25, 0])


def test_updates_balance_a_lopsided_router(rng):
    """All tokens prefer expert 0 by far; steps of the bias alone spread them."""
    layer = ROUTERS["loss_free"](CONFIG, rngs=nnx.Rngs(0), update_rate=0.02)
    x = normal(rng, 64, 16).at[:, 0].set(4.0)
    layer.router.gate.kernel[0, 0] = 2.0

    @nnx.jit
    def step(layer, x):
        _, aux = layer(x, train=True)
        layer.update(aux)
        return aux.load.cv

    cvs = [float(step(layer, x)) for _ in range(60)]
    assert np.mean(cvs[-5:]) < 0.5 * cvs[0], cvs


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"loss_free", "group_limited"}))
def test_update_changes_nothing_elsewhere(name):
    layer = new_layer(name)
    before = jax.tree.map(jnp.copy, nnx.state(layer, nnx.Not(nnx.RngState)))
    layer.update(aux_with([6, 0, 3, 3, 3, 4, 2, 3]))
    assert same_bits(nnx.state(layer, nnx.Not(nnx.RngState)), before)


def test_noise_only_while_training(rng):
    layer = layer_of("noisy_top_k", nnx.Rngs(params=0, router=1))
    layer.router.gate.kernel[...] = normal(rng, 16, 8)
    x = normal(rng, 32, 16)
    outputs = [np.asarray(call(layer, x)[0]) for call in (inference, inference, training, training)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[2], outputs[3])


def test_noise_with_all_experts_chosen(rng):
    """Every expert is certain to be chosen, so that the smooth load is balanced."""
    layer = layer_of("noisy_top_k", top_k=8)
    _, aux = training(layer, normal(rng, 32, 16))
    assert float(aux.losses["load"]) == 0


def test_switch_counts_what_it_drops(rng):
    layer = layer_of("switch")
    x = normal(rng, 32, 16).at[:, 0].set(8.0)
    layer.router.gate.kernel[...] = jnp.zeros((16, 8)).at[0, 3].set(1.0)
    y, aux = inference(layer, x)
    np.testing.assert_array_equal(aux.load.tokens_per_expert, [0, 0, 0, 32, 0, 0, 0, 0])
    np.testing.assert_array_equal(aux.load.dropped_per_expert, [0, 0, 0, 32 - 5, 0, 0, 0, 0])
    np.testing.assert_array_equal(np.asarray(y).any(1), np.arange(32) < 5)


def test_capacity_with_several_choices_is_not_causal():
    assert not layer_of("softmax", capacity_factor=1.0).causal
    assert layer_of("softmax").causal


def test_expert_choice_is_balanced_and_counts_tokens_left_out(rng):
    layer = layer_of("expert_choice")
    y, aux = inference(layer, normal(rng, 4, 8, 16))
    np.testing.assert_array_equal(aux.load.tokens_per_expert, np.full(8, 8))  # ⌈32 · 2 / 8⌉
    assert int(aux.load.unrouted) == 32 - int(np.asarray(y).any(2).sum())


def test_of_equal_tokens_experts_choose_the_first():
    layer = layer_of("expert_choice")
    y, aux = inference(layer, jnp.zeros((32, 16)).at[:, 0].set(1.0))
    np.testing.assert_array_equal(np.asarray(y).any(1), np.arange(32) < 8)
    assert int(aux.load.unrouted) == 32 - 8


def test_an_expert_takes_no_more_tokens_than_there_are(rng):
    layer = layer_of("expert_choice", capacity_factor=100.0)
    _, aux = inference(layer, normal(rng, 3, 16))
    np.testing.assert_array_equal(aux.load.tokens_per_expert, np.full(8, 3))


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 5), (4, 1), (1, 1)])
def test_hash_table_is_balanced_and_distinct(experts, top_k):
    table = hash_table(43, experts, top_k, seed=0)
    assert table.shape == (-(-43 // experts) * experts, top_k)
    assert all(len(set(row)) == top_k for row in table)
    for column in table.T:
        np.testing.assert_array_equal(np.bincount(column, minlength=experts), len(table) // experts)
    np.testing.assert_array_equal(table, hash_table(43, experts, top_k, seed=0))


def test_hash_routing_of_padding(rng):
    layer = ROUTERS["hash"](CONFIG, rngs=nnx.Rngs(0), vocabulary=64)
    x = normal(rng, 4, 16)
    y, aux = inference(layer, x, jnp.array([1, -1, 2, -7]))
    np.testing.assert_array_equal(np.asarray(y).any(1), [True, False, True, False])
    assert int(aux.load.unrouted) == 2
    assert int(aux.load.tokens_per_expert.sum()) == 4


@pytest.mark.parametrize(
    ("token_ids", "parts"),
    [
        (None, ("token_ids must be given for hash routing, got None", "layer(x, token_ids=ids)")),
        (np.zeros((4,), np.float32), ("token_ids must be integers of shape [4]", "got float32[4]")),
        (np.zeros((2, 2), np.int32), ("token_ids must be integers of shape [4]", "got int32[2, 2]")),
    ],
)
def test_token_ids_that_do_not_fit(token_ids, parts, rng):
    layer = new_layer("hash")
    with raises_saying(ValueError, *parts):
        layer(normal(rng, 4, 16), token_ids=token_ids)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hash", {"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ("loss_free", {"update_rate": 0.0}, "update_rate must be positive, got 0.0"),
        ("soft_moe", {"slots_per_expert": 0}, "slots_per_expert must be at least 1, got 0"),
        ("chain_of_experts", {"passes": 0}, "passes must be at least 1, got 0"),
        ("specialized", {"common_width": 0}, "common_width must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(name, settings, message):
    with raises_saying(ValueError, message):
        ROUTERS[name](CONFIG, rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize("name", ["expert_choice", "soft_moe"])
def test_scaled_inputs_are_refused_where_tokens_have_no_one_weight(name):
    with raises_saying(ValueError, "scale_inputs must be False for the router", name):
        layer_of(name, top_k=1, scale_inputs=True)


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4, 16)])
@pytest.mark.parametrize("name", ["soft_moe", "loss_free"])
def test_any_leading_dimensions(name, shape, rng):
    y, aux = inference(new_layer(name), normal(rng, *shape, dtype=jnp.bfloat16))
    assert y.shape == shape
    assert y.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert aux.loss.dtype == jnp.float32


def test_soft_moe_has_as_many_slots_as_256_tokens_have_choices():
    assert layer_of("soft_moe").router.slots_per_expert == 64
    assert layer_of("soft_moe", capacity_factor=0.5).router.slots_per_expert == 32


def test_a_router_without_a_rule_says_what_is_missing(rng):
    class Empty(Router):
        pass

    with raises_saying(NotImplementedError, "Empty must define __call__(x, batch) -> Decision"):
        RoutedMoE(CONFIG, Empty(CONFIG), rngs=nnx.Rngs(0))(normal(rng, 4, 16))

"""What the strategies set, the state that no gradient trains, and calls that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import ROUTERS, MoE, MoEAux, MoEConfig, Router, RouterState, Routing, TopKRouter, make_mesh, with_changes
from moejax.losses import LoadStats
from moejax.param import Param
from moejax.routers import (
    ChainRouter,
    Decision,
    ExpertChoiceRouter,
    HashRouter,
    NoisyTopKRouter,
    SoftRouter,
    SpecializedRouter,
)
from moejax.routers.hash import hash_table
from moejax.routers.noisy_top_k import noise_of_tokens
from moejax.routers.strategies import default_groups
from sharding.tokens import Tokens
from tests.helpers import LIMIT, normal, raises_saying, relative_error, same_bits
from tests.moejax.routers.layers import inference, new_layer

CONFIG = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=8, top_k=2, dtype=jnp.float32)


training = nnx.jit(lambda layer, x: layer(x, train=True))


def config_of(name, settings=(), **changes) -> MoEConfig:
    return ROUTERS[name](with_changes(CONFIG, **changes), **dict(settings))


def layer_of(name, settings=(), rngs=None, **changes) -> MoE:
    return MoE(config_of(name, settings, **changes), rngs=rngs or nnx.Rngs(0))


DEFAULTS = {
    "softmax": TopKRouter(load_balance_loss=0.01),
    "noisy_top_k": NoisyTopKRouter(importance_loss=0.1, load_loss=0.1),
    "switch": TopKRouter(load_balance_loss=0.01, normalize_topk=False),
    "loss_free": TopKRouter(scoring="sigmoid", correction_bias=True, sequence_balance_loss=1e-4),
    "group_limited": TopKRouter(
        scoring="sigmoid", correction_bias=True, sequence_balance_loss=1e-4, num_groups=4, topk_groups=2
    ),
    "expert_choice": ExpertChoiceRouter(capacity_factor=1.0),
    "soft_moe": SoftRouter(),
    "chain_of_experts": ChainRouter(passes=2, each=TopKRouter(load_balance_loss=0.01)),
    "hash": HashRouter(),
    "specialized": SpecializedRouter(specialization_loss=0.01),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_defaults(name):
    """From a configuration made for another router, of which nothing is left."""
    config = config_of(name, scoring="sqrt_softplus", correction_bias=True, z_loss=0.3, group_score_k=1)
    assert config.router == DEFAULTS[name]
    top_k = {"switch": 1, "chain_of_experts": 1}.get(name, 2)
    expected = dataclasses.replace(CONFIG, top_k=top_k, capacity_factor=1.25 if name == "switch" else None)
    assert dataclasses.replace(config, router=CONFIG.router) == expected


@pytest.mark.parametrize("name", ROUTERS)
def test_the_scale_of_weights_and_the_bias_of_a_gate_are_kept(name):
    router = config_of(name, router_bias=True, routed_scaling_factor=2.5).router
    router = router.each if isinstance(router, ChainRouter) else router
    assert getattr(router, "routed_scaling_factor", 2.5) == 2.5
    assert getattr(router, "router_bias", True)


def test_what_the_configuration_sets_comes_first():
    assert config_of("switch", capacity_factor=2.0).capacity_factor == 2.0
    assert config_of("expert_choice", capacity_factor=2.0).router.capacity_factor == 2.0
    assert config_of("expert_choice", capacity_factor=2.0).capacity_factor is None
    assert not config_of("softmax", normalize_topk=False).router.normalize_topk
    grouped = config_of("group_limited", num_groups=2, topk_groups=1).router
    assert (grouped.num_groups, grouped.topk_groups) == (2, 1)


def test_settings_come_before_all_else():
    assert config_of("softmax", {"load_balance_loss": 0.3}).router.load_balance_loss == 0.3
    assert config_of("softmax", {"normalize_topk": True}, normalize_topk=False).router.normalize_topk
    assert config_of("loss_free", {"sequence_balance_loss": 0.2}).router.sequence_balance_loss == 0.2
    assert config_of("expert_choice", {"capacity_factor": 3.0}, capacity_factor=2.0).router.capacity_factor == 3.0
    grouped = config_of("group_limited", {"num_groups": 2, "topk_groups": 1}, num_groups=4, topk_groups=3).router
    assert (grouped.num_groups, grouped.topk_groups) == (2, 1)
    chained = config_of("chain_of_experts", {"passes": 4, "z_loss": 0.5}, top_k=8)
    assert (chained.router.passes, chained.router.each.z_loss, chained.top_k) == (4, 0.5, 2)
    with pytest.raises(TypeError, match="slots"):
        config_of("softmax", {"slots_per_expert": 2})


@pytest.mark.parametrize(
    ("experts", "top_k", "groups"), [(64, 8, (8, 4)), (16, 2, (8, 4)), (8, 2, (4, 2)), (4, 3, (2, 2)), (6, 1, (2, 1))]
)
def test_default_groups(experts, top_k, groups):
    assert default_groups(experts, top_k) == groups


def test_experts_that_make_no_groups():
    with raises_saying(ValueError, "num_experts=7 does not divide into 8, 4 or 2 groups", "set num_groups"):
        config_of("group_limited", num_experts=7)


def aux_with(load) -> MoEAux:
    nothing = jnp.zeros((0, 2))
    return MoEAux({}, LoadStats(jnp.asarray(load, jnp.int32), jnp.zeros(8, jnp.int32)), nothing.astype(int), nothing)


@pytest.mark.parametrize("name", ["loss_free", "group_limited"])
def test_update_moves_the_bias_against_the_load(name):
    layer = layer_of(name, {"update_rate": 0.25})
    assert isinstance(layer.router["correction_bias"], RouterState)
    nnx.jit(lambda layer, aux: layer.update(aux))(layer, aux_with([6, 0, 3, 3, 3, 4, 2, 3]))
    np.testing.assert_array_equal(layer.router["correction_bias"][...], [-0.25, 0.25, 0, 0, 0, -0.25, 0.25, 0])


def test_update_moves_the_biases_of_all_passes():
    layer = layer_of("chain_of_experts", {"correction_bias": True, "update_rate": 0.5})
    layer.update(aux_with([6, 0, 3, 3, 3, 4, 2, 3]))
    moved = [-0.5, 0.5, 0, 0, 0, -0.5, 0.5, 0]
    np.testing.assert_array_equal(layer.router["correction_bias"][...], [moved, moved])


def test_a_chain_counts_what_all_passes_chose_and_dropped(rng):
    layer, x = layer_of("chain_of_experts", capacity_factor=0.25), normal(rng, 32, 16)
    _, aux = inference(layer, x)
    counts = np.bincount(np.asarray(aux.topk_ids).reshape(-1), minlength=8)
    assert counts.sum() == 2 * 32
    np.testing.assert_array_equal(aux.load.tokens_per_expert, counts)
    of_passes = [np.bincount(np.asarray(aux.topk_ids)[:, number], minlength=8) for number in range(2)]
    room = 1  # ⌈0.25 · 32 · 1 / 8⌉
    np.testing.assert_array_equal(aux.load.dropped_per_expert, sum(np.maximum(each - room, 0) for each in of_passes))


def test_a_bias_stays_where_the_load_is_the_mean():
    layer = layer_of("loss_free", {"update_rate": 0.5})
    load = jnp.array([11, 9, 9, 5, 11, 4, 8, 7])  # whose median is 8.5
    layer.update(MoEAux({}, LoadStats(load, jnp.zeros(8, jnp.int32)), None, None))
    np.testing.assert_array_equal(layer.router["correction_bias"][...], [-0.5, -0.5, -0.5, 0.5, -0.5, 0.5, 0.0, 0.5])


def test_updates_balance_a_lopsided_router(rng):
    """All tokens prefer expert 0 by far; steps of the bias alone spread them."""
    layer = layer_of("loss_free", {"update_rate": 0.02})
    x = normal(rng, 64, 16).at[:, 0].set(4.0)
    layer.router["kernel"][0, 0] = 2.0

    @nnx.jit
    def step(layer, x):
        _, aux = layer(x, train=True)
        layer.update(aux)
        return aux.load.cv

    cvs = [float(step(layer, x)) for _ in range(60)]
    assert np.mean(cvs[-5:]) < 0.5 * cvs[0], cvs


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"loss_free", "group_limited"}))
@pytest.mark.quick("hash", "soft_moe", "switch")
def test_update_changes_nothing_elsewhere(name):
    layer = new_layer(name)
    before = jax.tree.map(jnp.copy, nnx.state(layer, nnx.Not(nnx.RngState)))
    layer.update(aux_with([6, 0, 3, 3, 3, 4, 2, 3]))
    assert same_bits(nnx.state(layer, nnx.Not(nnx.RngState)), before)


def test_noise_only_while_training(rng):
    layer = layer_of("noisy_top_k", rngs=nnx.Rngs(params=0, router=1))
    layer.router["kernel"][...] = normal(rng, 16, 8)
    x = normal(rng, 32, 16)
    outputs = [np.asarray(call(layer, x)[0]) for call in (inference, inference, training, training)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[2], outputs[3])


@pytest.mark.slow
def test_whether_it_is_training_can_be_a_state_of_the_layer(rng):
    layer = layer_of("noisy_top_k", rngs=nnx.Rngs(params=0, router=1))
    layer.router["kernel"][...] = normal(rng, 16, 8)
    x, call = normal(rng, 32, 16), nnx.jit(lambda layer, x: layer(x)[0])
    quiet = inference(layer, x)[0]
    assert not np.array_equal(call(layer, x), quiet)
    layer.eval()
    np.testing.assert_array_equal(call(layer, x), quiet)
    layer.train()
    assert not np.array_equal(call(layer, x), quiet)
    silent = layer_of("noisy_top_k").config
    assert MoE(silent, rngs=nnx.Rngs(0), deterministic=True).deterministic


def test_a_noisy_layer_without_random_numbers(rng):
    config = config_of("noisy_top_k")
    layer = MoE.from_params(MoE(config, rngs=nnx.Rngs(0)).params(), config)
    inference(layer, normal(rng, 4, 16))
    with raises_saying(ValueError, "a layer with a noisy router needs random numbers to train", "nnx.Rngs(router=0"):
        layer(normal(rng, 4, 16), train=True)


def test_noise_is_standard_normal_and_goes_by_the_place_of_a_token():
    key = jax.random.key(7)
    noise = np.asarray(noise_of_tokens(key, Tokens.on_one_chip(4000), 8))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert np.abs(np.corrcoef(noise.T) - np.eye(8)).max() < 0.1
    assert np.unique(noise).size > 0.99 * noise.size
    places = jnp.array([17, 3999, 0])
    some = noise_of_tokens(key, Tokens(places, total=4000, sequence_length=4000), 8)
    np.testing.assert_array_equal(some, noise[np.asarray(places)])
    assert not np.array_equal(noise_of_tokens(jax.random.key(8), Tokens.on_one_chip(3), 8), noise[:3])


def test_noise_with_all_experts_chosen(rng):
    """Every expert is certain to be chosen, so that the smooth load is balanced."""
    layer = layer_of("noisy_top_k", top_k=8)
    _, aux = training(layer, normal(rng, 32, 16))
    assert float(aux.losses["load"]) == 0


def test_switch_counts_what_it_drops(rng):
    layer = layer_of("switch")
    x = normal(rng, 32, 16).at[:, 0].set(8.0)
    layer.router["kernel"][...] = jnp.zeros((16, 8)).at[0, 3].set(1.0)
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
    layer = layer_of("hash", {"vocabulary": 64})
    x = normal(rng, 4, 16)
    y, aux = inference(layer, x, jnp.array([1, -1, 2, -7]))
    np.testing.assert_array_equal(np.asarray(y).any(1), [True, False, True, False])
    assert int(aux.load.unrouted) == 2
    assert int(aux.load.tokens_per_expert.sum()) == 4


@pytest.mark.parametrize(
    ("token_ids", "parts"),
    [
        (None, ("token_ids must be given for hash routing, got None", "or the block around it, with token_ids=ids")),
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
        ("hash", {"vocabulary": 0}, "vocabulary must be a whole number of at least 1, got 0"),
        ("hash", {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ("loss_free", {"update_rate": 0.0}, "update_rate must be positive and finite, got 0.0"),
        ("soft_moe", {"slots_per_expert": 0}, "slots_per_expert must be a whole number of at least 1, got 0"),
        ("chain_of_experts", {"passes": 0}, "passes must be at least 1, got 0"),
        (
            "chain_of_experts",
            {"scoring": "tanh"},
            "scoring must be 'softmax' or 'sigmoid' or 'sqrt_softplus', got 'tanh'",
        ),
        ("specialized", {"common_width": 0}, "common_width must be a whole number of at least 1, got 0"),
        ("specialized", {"specialization_loss": -1}, "specialization_loss must be at least 0, got -1"),
        ("noisy_top_k", {"importance_loss": -1}, "importance_loss must be at least 0, got -1"),
        ("noisy_top_k", {"load_loss": float("nan")}, "load_loss must be at least 0, got nan"),
        ("expert_choice", {"capacity_factor": 0}, "capacity_factor must be positive and finite, got 0"),
        ("expert_choice", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor must be finite, got inf"),
    ],
)
def test_settings_that_make_no_sense(name, settings, message):
    with raises_saying(ValueError, message):
        config_of(name, settings)


@pytest.mark.parametrize("name", ["expert_choice", "soft_moe"])
def test_scaled_inputs_are_refused_where_tokens_have_no_one_weight(name):
    with raises_saying(ValueError, "scale_inputs must be False with", type(DEFAULTS[name]).__name__, "got True"):
        config_of(name, top_k=1, scale_inputs=True)


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4, 16)])
@pytest.mark.parametrize("name", ["soft_moe", "loss_free"])
@pytest.mark.quick("loss_free-shape1")
def test_any_leading_dimensions(name, shape, rng):
    y, aux = inference(new_layer(name), normal(rng, *shape, dtype=jnp.bfloat16))
    assert y.shape == shape
    assert y.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert aux.loss.dtype == jnp.float32


def test_soft_moe_has_as_many_slots_as_256_tokens_have_choices():
    assert layer_of("soft_moe").router["phi"].shape == (16, 8, 64)
    assert layer_of("soft_moe", top_k=1).router["phi"].shape == (16, 8, 32)
    assert layer_of("soft_moe", {"slots_per_expert": 3}).router["phi"].shape == (16, 8, 3)


class InTurn(Router):
    """A router of one's own: the experts in turn, by the place of the token in the batch."""

    def table(self, config):
        return {}

    def route(self, x, params, config, tokens, given):
        ids = (tokens.index[:, None] + jnp.arange(config.top_k)) % config.num_experts
        nothing = jnp.zeros((x.shape[0], config.num_experts))
        return Decision(Routing(ids, jnp.full(ids.shape, 0.5), nothing, nothing), {"size": tokens.sum((x**2).sum())})


def test_a_router_of_ones_own(rng):
    config, x = dataclasses.replace(CONFIG, router=InTurn()), normal(rng, 3, 7, 16)
    layer = MoE(config, rngs=nnx.Rngs(0))
    y, aux = inference(layer, x)
    np.testing.assert_array_equal(aux.topk_ids.reshape(21, 2)[:, 0], np.arange(21) % 8)
    np.testing.assert_allclose(aux.loss, (x**2).sum(), rtol=1e-5)
    with jax.set_mesh(make_mesh(ep=4, dp=2)):
        mesh_y, mesh_aux = inference(MoE(config, rngs=nnx.Rngs(0)), x)
    assert relative_error(mesh_y, y) < LIMIT["float32"]
    assert same_bits(mesh_aux.topk_ids, aux.topk_ids)
    np.testing.assert_allclose(mesh_aux.loss, aux.loss, rtol=1e-5)


def test_a_router_without_a_rule_says_what_is_missing(rng):
    class Empty(Router):
        pass

    class WithoutRule(Router):
        def table(self, config):
            return {}

    with raises_saying(NotImplementedError, "Empty must define table(config) -> dict[str, Param]"):
        MoE(dataclasses.replace(CONFIG, router=Empty()), rngs=nnx.Rngs(0))
    layer = MoE(dataclasses.replace(CONFIG, router=WithoutRule()), rngs=nnx.Rngs(0))
    with raises_saying(NotImplementedError, "WithoutRule must define route(x, params, config, tokens, given)"):
        layer(normal(rng, 4, 16))


def test_what_makes_parameters_is_the_same_for_equal_layers():
    """Programs that make them are kept by it."""
    for name, part in (("soft_moe", "phi"), ("hash", "table")):
        first, second = (config.router.table(config)[part] for config in (config_of(name), config_of(name)))
        assert first == second


def test_a_chain_keeps_and_gives_on_what_a_gate_has():
    config = with_changes(CONFIG, routed_scaling_factor=2.5, router_bias=True, normalize_topk=False, num_groups=4)
    chain = ROUTERS["chain_of_experts"](with_changes(config, topk_groups=2))
    for name in ("softmax", "group_limited", "chain_of_experts"):
        router = ROUTERS[name](chain).router
        gate = getattr(router, "each", router)
        assert (gate.routed_scaling_factor, gate.router_bias, gate.normalize_topk) == (2.5, True, False), name


@pytest.mark.parametrize("router", [ExpertChoiceRouter(), SoftRouter()], ids=lambda router: type(router).__name__)
def test_a_capacity_of_the_layer_is_refused_where_it_would_do_nothing(router):
    with raises_saying(ValueError, "capacity_factor must be None with", type(router).__name__, "got 1.0"):
        MoEConfig(16, 8, 8, 2, router=router, capacity_factor=1.0)


def test_a_scalar_parameter_of_a_router(rng):
    @dataclasses.dataclass(frozen=True)
    class Tempered(TopKRouter):
        def table(self, config):
            return super().table(config) | {"heat": Param((), (), "scalar", nnx.initializers.ones)}

    layer = MoE(dataclasses.replace(CONFIG, router=Tempered()), rngs=nnx.Rngs(0))
    x = normal(rng, 4, 16)
    layer(x)
    layer.router.heat[...] = jnp.nan
    with raises_saying(ValueError, "params.router['heat'] holds NaN"):
        layer(x)


def test_a_parameter_that_a_router_has_not():
    router = new_layer("softmax").router
    assert list(router) == ["kernel", "bias"]
    with pytest.raises(KeyError, match="noise_kernel"):
        router["noise_kernel"]

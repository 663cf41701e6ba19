"""Router losses and load statistics against the papers' formulas, on one chip and over eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import LoadStats, MoEConfig, TopKRouter, make_mesh, moe, with_changes
from moejax.losses import (
    importance_loss,
    load_balance_loss,
    router_losses,
    sequence_balance_loss,
    specialization_loss,
    tokens_per_expert,
    z_loss,
)
from sharding.tokens import Tokens
from tests.helpers import normal, relative_error
from tests.moejax.layers import random_params

EXPERTS, TOP_K = 8, 2
CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=EXPERTS,
    top_k=TOP_K,
    router=TopKRouter(load_balance_loss=0.5, sequence_balance_loss=0.25, z_loss=0.125),
    dtype=jnp.float32,
)
SIGMOID = with_changes(CONFIG, scoring="sigmoid")
WEIGHTS = {"load_balance": 0.5, "sequence_balance": 0.25, "z": 0.125}


def route_logits(logits, config):
    return config.router.choose(logits, config)


routed = functools.partial(jax.jit, static_argnums=1)(route_logits)


def whole(num_tokens: int, sequence_length: int | None = None) -> Tokens:
    return Tokens.on_one_chip(num_tokens, sequence_length or num_tokens)


def padded(num_positions: int, num_tokens: int, sequence_length: int) -> Tokens:
    """Tokens with positions behind them that hold none."""
    return Tokens.on_one_chip(num_positions, sequence_length, jnp.arange(num_positions) < num_tokens)


def shares(routing):
    """Per token: which experts it chose, and its scores over their sum."""
    chosen = np.zeros(routing.scores.shape)
    for token, ids in enumerate(np.asarray(routing.topk_ids)):
        chosen[token, ids] = 1
    scores = np.asarray(routing.scores, np.float64)
    return chosen, scores / scores.sum(1, keepdims=True)


def balance(chosen, probabilities):
    """E Σ_e f_e P_e of some tokens."""
    load = chosen.sum(0) / (len(chosen) * TOP_K)
    return EXPERTS * sum(f * p for f, p in zip(load, probabilities.mean(0), strict=True))


@pytest.mark.parametrize("config", [CONFIG, SIGMOID], ids=["softmax", "sigmoid"])
def test_losses_equal_the_formulas(config, rng):
    logits = normal(rng, 24, EXPERTS)
    routing = routed(logits, config)
    chosen, probabilities = shares(routing)
    tokens = whole(24, 6)
    by_sequence = [balance(chosen[i : i + 6], probabilities[i : i + 6]) for i in range(0, 24, 6)]
    expected = {
        "load_balance": balance(chosen, probabilities),
        "sequence_balance": np.mean(by_sequence),
        "z": np.mean(np.log(np.exp(np.asarray(logits, np.float64)).sum(1)) ** 2),
    }
    functions = {
        "load_balance": load_balance_loss(routing, tokens),
        "sequence_balance": sequence_balance_loss(routing, tokens),
        "z": z_loss(routing, tokens),
    }
    weighted = router_losses(routing, tokens, **WEIGHTS)
    assert set(weighted) == set(expected)
    assert config.router.losses(routing, tokens) == weighted
    for name, value in expected.items():
        np.testing.assert_allclose(functions[name], value, rtol=1e-5)
        np.testing.assert_allclose(weighted[name], WEIGHTS[name] * value, rtol=1e-5)
        assert weighted[name].dtype == jnp.float32
    assert tokens_per_expert(routing.topk_ids, EXPERTS, tokens).tolist() == chosen.sum(0).tolist()


def test_losses_of_weight_zero_are_left_out(rng):
    config = with_changes(CONFIG, load_balance_loss=0.0, sequence_balance_loss=0.0)
    assert list(config.router.losses(routed(normal(rng, 4, EXPERTS), config), whole(4))) == ["z"]


@pytest.mark.parametrize("config", [CONFIG, SIGMOID], ids=["softmax", "sigmoid"])
def test_balanced_load_costs_one(config, rng):
    """Every cyclic shift of one row of logits: all experts are equally likely, and equally often chosen."""
    row = rng.permutation(EXPERTS) / 4
    routing = routed(jnp.asarray(np.stack([np.roll(row, s) for s in range(EXPERTS)]), jnp.float32), config)
    np.testing.assert_allclose(load_balance_loss(routing, whole(EXPERTS)), 1, rtol=1e-6)
    np.testing.assert_allclose(sequence_balance_loss(routing, whole(EXPERTS)), 1, rtol=1e-6)


def test_one_expert_for_all_costs_as_much_as_there_are_experts():
    config = dataclasses.replace(CONFIG, top_k=1)
    routing = routed(jnp.zeros((6, EXPERTS)).at[:, 3].set(50.0), config)
    np.testing.assert_allclose(load_balance_loss(routing, whole(6)), EXPERTS, rtol=1e-6)


def test_sequences_are_balanced_one_by_one():
    """Each sequence uses one expert, all together use all: balanced over the batch, unbalanced in every sequence."""
    config = dataclasses.replace(CONFIG, top_k=1)
    routing = routed(jnp.repeat(50 * jnp.eye(EXPERTS), 3, axis=0), config)
    np.testing.assert_allclose(load_balance_loss(routing, whole(3 * EXPERTS, 3)), 1, rtol=1e-6)
    np.testing.assert_allclose(sequence_balance_loss(routing, whole(3 * EXPERTS, 3)), EXPERTS, rtol=1e-6)


def test_padding_counts_for_nothing(rng):
    logits = normal(rng, 10, EXPERTS)
    more = jnp.concatenate([logits, 100 * normal(rng, 10, EXPERTS)])
    expected = jax.jit(lambda logits: router_losses(route_logits(logits, CONFIG), whole(10, 5), **WEIGHTS))(logits)
    losses = jax.jit(lambda logits: router_losses(route_logits(logits, CONFIG), padded(20, 10, 5), **WEIGHTS))(more)
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-6)


def test_masked_positions_count_for_nothing(rng):
    """Sequences of unequal length: each counts as one, by what its own tokens do; one without a token does not."""
    logits = normal(rng, 24, EXPERTS)
    real = np.asarray([1, 1, 1, 0, 0, 0] + [1] * 6 + [0] * 6 + [0, 0, 1, 0, 1, 0], bool)
    routing = routed(logits, CONFIG)
    chosen, probabilities = shares(routing)
    tokens = Tokens.on_one_chip(24, 6, jnp.asarray(real))
    of_sequences = [np.arange(i, i + 6)[real[i : i + 6]] for i in range(0, 24, 6)]
    by_sequence = [balance(chosen[places], probabilities[places]) for places in of_sequences if places.size]
    z = np.log(np.exp(np.asarray(logits, np.float64)).sum(1)) ** 2
    np.testing.assert_allclose(
        load_balance_loss(routing, tokens), balance(chosen[real], probabilities[real]), rtol=1e-5
    )
    np.testing.assert_allclose(sequence_balance_loss(routing, tokens), np.mean(by_sequence), rtol=1e-5)
    np.testing.assert_allclose(z_loss(routing, tokens), z[real].mean(), rtol=1e-5)
    assert tokens_per_expert(routing.topk_ids, EXPERTS, tokens).tolist() == chosen[real].sum(0).tolist()


def test_scores_that_all_underflow_give_finite_losses():
    routing = routed(jnp.full((2, EXPERTS), -200.0), SIGMOID)
    assert np.isfinite(load_balance_loss(routing, whole(2)))


@pytest.fixture(scope="module")
def problem():
    """21 tokens, in sequences of seven: no number of chips divides them, and sequences lie across chips."""
    rng = np.random.default_rng(7)
    return normal(rng, 3, 7, CONFIG.hidden_size), random_params(CONFIG, rng)


def losses_and_gradient(x, params, mesh):
    def loss(kernel):
        _, aux = moe(x, dataclasses.replace(params, router={"kernel": kernel}), CONFIG, mesh=mesh)
        return aux.loss, aux

    (total, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params.router["kernel"])
    return total, aux, gradient


def test_losses_over_eight_chips_equal_those_of_one(problem):
    x, params = problem
    total, aux, gradient = losses_and_gradient(x, params, None)
    sharded_total, sharded_aux, sharded_gradient = losses_and_gradient(x, params, make_mesh(ep=4, dp=2))
    np.testing.assert_allclose(sharded_total, total, rtol=1e-6)
    for name, value in aux.losses.items():
        np.testing.assert_allclose(sharded_aux.losses[name], value, rtol=1e-6)
    assert sharded_aux.load.tokens_per_expert.tolist() == aux.load.tokens_per_expert.tolist()
    assert int(aux.load.tokens_per_expert.sum()) == 21 * TOP_K
    assert np.abs(gradient).max() > 0
    assert relative_error(sharded_gradient, gradient) < 1e-5


def drops_over_eight_chips(problem, config):
    """What is dropped on eight chips, and the ids that the router chose."""
    x, params = problem
    _, aux = jax.jit(functools.partial(moe, config=config, mesh=make_mesh(ep=4, dp=2)))(x, params)
    assert int(aux.load.dropped) > 0
    return aux.load.dropped_per_expert.tolist(), np.asarray(aux.topk_ids).reshape(21, TOP_K)


@pytest.mark.slow
def test_padding_takes_no_room_from_tokens(problem):
    """With a capacity of one row, two padding tokens before a real one would push it out."""
    config = dataclasses.replace(CONFIG, capacity_factor=1.0, capacity_of="chip")
    got, ids = drops_over_eight_chips(problem, config)
    dropped = np.zeros(EXPERTS, int)
    for chip in range(7):  # three tokens each; the eighth has padding only
        load = np.bincount(ids[3 * chip : 3 * chip + 3].ravel(), minlength=EXPERTS)
        dropped += np.maximum(load - 1, 0)
    assert got == dropped.tolist()


@pytest.mark.slow
def test_a_capacity_of_the_batch_is_of_the_tokens_without_padding(problem):
    """⌈21 · 2 / 8⌉ = 6 of an expert's choices are kept wherever they are made."""
    config = dataclasses.replace(CONFIG, capacity_factor=1.0)
    got, ids = drops_over_eight_chips(problem, config)
    assert got == np.maximum(np.bincount(ids.ravel(), minlength=EXPERTS) - 6, 0).tolist()


@pytest.mark.parametrize("name", ["load_balance", "sequence_balance", "z"])
def test_gradient_flows_through_each_loss(name, rng):
    """Against finite differences in float64 of the formulas, the load held fixed."""
    logits, direction = normal(rng, 12, EXPERTS), normal(rng, 12, EXPERTS)
    chosen, _ = shares(routed(logits, CONFIG))

    def formula(values):
        probabilities = np.exp(values) / np.exp(values).sum(1, keepdims=True)
        if name == "z":
            return np.mean(np.log(np.exp(values).sum(1)) ** 2)
        length = 4 if name == "sequence_balance" else 12
        parts = [balance(chosen[i : i + length], probabilities[i : i + length]) for i in range(0, 12, length)]
        return np.mean(parts)

    gradient = jax.jit(jax.grad(lambda v: CONFIG.router.losses(route_logits(v, CONFIG), whole(12, 4))[name]))(logits)
    base, step = np.asarray(logits, np.float64), 1e-4 * np.asarray(direction, np.float64)
    slope = (formula(base + step) - formula(base - step)) / 2e-4 * WEIGHTS[name]
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("load", "cv", "entropy"),
    [
        ([5, 5, 5, 5], 0, 1),
        ([8, 0, 0, 0], 3**0.5, 0),
        ([4, 4, 0, 0], 1, 0.5),
        ([1, 2, 3, 4], 0.2**0.5, -sum(p * np.log(p) for p in (0.1, 0.2, 0.3, 0.4)) / np.log(4)),
        ([0, 0, 0, 0], 0, 0),
    ],
)
def test_load_statistics(load, cv, entropy):
    stats = LoadStats(jnp.array(load), jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(stats.cv, cv, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-6, atol=1e-6)
    assert float(stats.dropped_fraction) == 0


BALANCED, COLLAPSED = np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]], np.eye(4)[[2] * 8]
SPREAD = np.full((8, 4), 0.25)


@pytest.mark.parametrize(
    ("loss", "gates", "expected"),
    [
        (importance_loss, BALANCED, 0),
        (importance_loss, SPREAD, 0),
        (importance_loss, COLLAPSED, 3),  # variance 3/16 of the mean's square 1/16
        (importance_loss, np.zeros((8, 4)), 0),
        (specialization_loss, BALANCED, 0),
        (specialization_loss, SPREAD, 1),
        (specialization_loss, COLLAPSED, 1),
        (specialization_loss, np.eye(4)[[0, 0, 0, 0, 1, 1, 1, 1]], 0.5),
    ],
)
@pytest.mark.quick("importance_loss-gates0-0", "importance_loss-gates2-3", "specialization_loss-gates7-0.5")
def test_importance_and_specialization(loss, gates, expected):
    """Padding behind the tokens counts for nothing, and gradients are finite at the borders."""
    more = jnp.asarray(np.concatenate([gates, np.eye(4)[[0, 0, 0]]]), jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda gates: loss(gates, padded(11, 8, 11))))(more)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[8:].any()


def test_dropped_fraction():
    stats = LoadStats(jnp.array([6, 2, 0, 0]), jnp.array([4, 1, 0, 0]))
    assert int(stats.dropped) == 5
    assert float(stats.dropped_fraction) == 5 / 8

"""Steps of training: the optimiser against optax's own, and the loss of a real router falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bench.training.learner import CLIP, WEIGHT_DECAY, Learner, learning_rates, make_optimiser
from bench.training.runs import advance
from bench.training.settings import PRECISIONS, Variant, count_parameters, make_model
from moejax.routers import ROUTERS
from tests.bench.training.tiny_runs import SETTINGS, corpus
from tests.helpers import normal, same_bits


def test_learning_rate_warms_up_and_decays():
    rates = learning_rates(steps=100, peak=1.0)
    assert rates.shape == (100,)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert (np.diff(rates[10:]) < 0).all()
    np.testing.assert_allclose(rates[-1], 0.1, atol=2e-3)
    assert learning_rates(steps=1, peak=1.0).tolist() == [1.0]


def test_the_optimiser_is_clipped_adamw(rng):
    params = {"matrix": normal(rng, 4, 3), "vector": normal(rng, 3)}
    ours = make_optimiser()
    theirs = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY, mask={"matrix": True, "vector": False}),
    )
    state, other_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), params)
        found, state = ours.update(gradients, state, params)
        expected, other_state = theirs.update(gradients, other_state, params)
        for name in params:
            np.testing.assert_allclose(-0.01 * found[name], expected[name], rtol=1e-5)


def trained(learner, settings, steps, seed=0):
    """State and mean figures after some steps, and the held-out losses before and after."""
    text = corpus()
    held_out = text.held_out_batches(settings.batch_size, 2)
    state, chunks = learner.start(seed), jnp.asarray(text.train)
    before = learner.look(state, held_out)[0].loss
    state, figures = advance(learner, state, settings, text, chunks, seed, np.full(steps, 1e-2))
    return state, figures, float(before), learner.look(state, held_out)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"loss_free"}))
@pytest.mark.slow
def test_every_router_learns(router):
    _, _, before, (after, _) = trained(Learner(Variant(router), SETTINGS), SETTINGS, 20)
    assert float(after.loss) < 0.75 * before


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.slow
def test_every_precision_learns(precision):
    settings = dataclasses.replace(SETTINGS, hidden_size=128, intermediate_size=128, num_layers=1, num_experts=2)
    _, figures, before, (after, _) = trained(Learner(Variant("softmax", precision), settings), settings, 10)
    assert np.isfinite(figures["gradient_norm"])
    assert float(after.loss) < 0.75 * before


def test_a_precision_is_that_of_every_layer():
    settings = dataclasses.replace(SETTINGS, hidden_size=128, intermediate_size=128)
    for variant in (Variant("softmax"), Variant("chain_of_experts", "w8a8"), Variant("softmax", "w8a8g8")):
        model = nnx.eval_shape(lambda variant=variant: make_model(variant, settings, nnx.Rngs(0)))
        configs = [block.feed_forward.config for block in model.blocks]
        assert [config.precision for config in configs] == [variant.precision.removesuffix("g8")] * 2
        in_8_bits = {configs[0].quantization.gradient_dtype, configs[0].quantization.weights_gradient_dtype}
        assert in_8_bits == ({"float8_e4m3fn"} if variant.precision == "w8a8g8" else {None})


def test_steps_in_one_call_are_those_of_several_calls():
    learner, text = Learner(Variant("loss_free"), SETTINGS), corpus()
    places = text.train_places(SETTINGS.batch_size, seed=1, steps=range(3))
    rates = np.array([1e-2, 2e-2, 3e-2], np.float32)
    together, sums = learner.advance(learner.start(1), jnp.asarray(text.train), places, rates)
    state, parts = learner.start(1), []
    for first in (0, 1, 2):
        one = slice(first, first + 1)
        state, found = learner.advance(state, jnp.asarray(text.train), places[one], rates[one])
        parts.append(found)
    assert same_bits(together.params, state.params)
    assert same_bits(together.rest, state.rest)
    for name, total in sums.items():
        np.testing.assert_allclose(total, sum(part[name] for part in parts), rtol=1e-6)


@pytest.mark.slow
def test_the_loss_falls_and_seeds_repeat():
    learner = Learner(Variant("loss_free"), SETTINGS)
    state, figures, before, (after, skills) = trained(learner, SETTINGS, 70)
    assert np.isfinite(figures["loss"])
    assert float(after.loss) < 0.7 * before
    assert 0 < int(skills.words_right) < int(skills.words)
    again, same, _, _ = trained(learner, SETTINGS, 70)
    assert figures == same
    assert same_bits(state.params, again.params)
    assert trained(learner, SETTINGS, 70, seed=1)[1] != figures
    held_out = corpus().held_out_batches(SETTINGS.batch_size, 2)
    # What no gradient trains moved too: the bias that balances.
    biases = [leaf for leaf in jax.tree.leaves(state.rest) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert biases
    assert all(jnp.abs(bias).max() > 0 for bias in biases)

    choices = held_out[..., 1:].size * SETTINGS.top_k
    assert np.asarray(after.load.tokens_per_expert.sum(1)).tolist() == [choices] * SETTINGS.num_layers
    counts = count_parameters(state.params)
    experts = SETTINGS.num_layers * SETTINGS.num_experts * 3 * SETTINGS.hidden_size * SETTINGS.intermediate_size
    assert counts["expert_parameters"] == experts
    assert counts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params)) > experts

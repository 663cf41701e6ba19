"""Steps of training: the optimiser against optax's own, and the loss of a real router falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bench.training.learner import CLIP, WEIGHT_DECAY, Learner, learning_rates, make_optimiser
from bench.training.settings import count_parameters
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


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"loss_free"}))
@pytest.mark.slow
def test_every_router_learns(router):
    text = corpus()
    learner = Learner(router, SETTINGS)
    state, held_out = learner.start(0), text.held_out_batches(SETTINGS.batch_size, 2)
    before = float(learner.evaluate(state, held_out).loss)
    for step in range(20):
        state, _ = learner.step(state, text.train_batch(SETTINGS.batch_size, seed=0, step=step), 1e-2)
    assert float(learner.evaluate(state, held_out).loss) < 0.75 * before


@pytest.mark.slow
def test_the_loss_falls_and_seeds_repeat():
    text = corpus()
    learner = Learner("loss_free", SETTINGS)
    held_out = text.held_out_batches(SETTINGS.batch_size, 2)

    def trained(seed):
        state, losses = learner.start(seed), []
        for step in range(30):
            state, metrics = learner.step(state, text.train_batch(SETTINGS.batch_size, seed=seed, step=step), 1e-2)
            losses.append(float(metrics.loss))
        return state, losses

    before = learner.evaluate(learner.start(0), held_out)
    state, losses = trained(0)
    after = learner.evaluate(state, held_out)
    assert np.isfinite(losses).all()
    assert float(after.loss) < 0.7 * float(before.loss)
    again, same = trained(0)
    assert losses == same
    assert same_bits(state.params, again.params)
    assert trained(1)[1] != losses
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

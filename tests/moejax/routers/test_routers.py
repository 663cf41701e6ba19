"""Every router against its numpy reference: output, losses, gradients of all parameters; and under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import ROUTERS
from tests.helpers import LIMIT, float64, normal, relative_error, same_bits
from tests.moejax.routers.layers import BATCH, IDS, LENGTH, by_path, case, inference, new_layer
from tests.moejax.routers.reference import REFERENCES

every_router = pytest.mark.parametrize("name", ROUTERS)


def test_every_router_has_a_reference():
    assert set(REFERENCES) == set(ROUTERS)


def expected(name, arrays, setting, x):
    tokens = float64(x).reshape(-1, x.shape[-1])
    y, losses = REFERENCES[name](arrays, tokens, setting)
    return y.reshape(x.shape), losses


@every_router
@pytest.mark.quick(
    "noisy_top_k", "group_limited", "expert_choice", "soft_moe", "chain_of_experts", "switch", "hash", "specialized"
)
def test_output_and_losses_equal_the_reference(name):
    arrays, setting, x, _, y, aux, _ = case(name)
    expected_y, losses = expected(name, arrays, setting, x)
    assert relative_error(y, expected_y) < LIMIT["float32"]
    assert set(aux.losses) == set(losses)
    for loss_name, loss in losses.items():
        np.testing.assert_allclose(aux.losses[loss_name], loss, rtol=2e-5, err_msg=loss_name)


@every_router
def test_gradients_equal_differences_of_the_reference(name, rng):
    """Along a random direction in each parameter, the gate's among them, and in x."""
    arrays, setting, x, target, _, _, gradients = case(name)
    assert not {"router.correction_bias", "router.table"} & set(gradients)

    def loss(changed: dict):
        values = arrays | {"x": float64(x)} | changed
        y, losses = expected(name, values, setting, values["x"])
        return (y * float64(target)).sum() + sum(losses.values())

    for path, gradient in gradients.items():
        start = float64(x) if path == "x" else arrays[path]
        size = np.linalg.norm(gradient)
        assert size > 1e-3, path
        direction = rng.standard_normal(start.shape)
        step = 1e-6
        slope = (loss({path: start + step * direction}) - loss({path: start - step * direction})) / (2 * step)
        assert abs((gradient * direction).sum() - slope) < 1e-4 * size, path


@pytest.mark.parametrize("name", ["noisy_top_k", "expert_choice", "soft_moe", "chain_of_experts"])
@pytest.mark.slow
def test_rematerialised_layers_have_the_same_gradients(name):
    layer = new_layer(name, np.random.default_rng(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    _, _, x, target, _, _, gradients = case(name)

    @jax.jit
    def gradients_of(params, rest, x):
        @jax.checkpoint
        def loss(params, rest, x):
            y, aux = nnx.merge(graph, params, rest)(x, token_ids=IDS, train=True)
            return (y * target).sum() + aux.loss

        return jax.grad(loss)(params, rest, x)

    for path, gradient in by_path(gradients_of(params, rest, x)).items():
        assert relative_error(gradient, gradients[path]) < LIMIT["float32"], path


@every_router
@pytest.mark.quick("expert_choice")
def test_known_nan_is_refused_and_hidden_nan_shows(name):
    layer = new_layer(name, np.random.default_rng(0))
    _, _, x, *_ = case(name)
    bad = x.at[1, 2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="x holds NaN in 1 of 10 tokens"):
        layer(bad, token_ids=IDS)
    y, _ = inference(layer, bad, IDS)
    assert np.isnan(y[1, 2]).all()


@every_router
@pytest.mark.quick("chain_of_experts")
def test_causal_is_what_the_layer_says(name):
    """The first sequence's beginning is the same whatever comes after it; where experts or slots choose, it is not."""
    rng = np.random.default_rng(3)
    layer = new_layer(name, rng)
    _, _, x, *_ = case(name)
    later = x.at[:, 3:].set(normal(rng, BATCH, LENGTH - 3, 16)).at[1].set(normal(rng, LENGTH, 16))
    y, _ = inference(layer, x, IDS)
    changed, _ = inference(layer, later, IDS)
    assert layer.causal == (name not in ("expert_choice", "soft_moe"))
    assert (relative_error(changed[0, :3], y[0, :3]) < 1e-6) == layer.causal


@every_router
@pytest.mark.quick("expert_choice")
def test_a_sequence_that_is_masked_is_as_none(name):
    """It takes no expert, no capacity and no slot, is in no loss and no load, and may be NaN."""
    layer = new_layer(name, np.random.default_rng(0))
    _, _, x, *_ = case(name)
    mask = jnp.array([[True] * LENGTH, [False] * LENGTH])
    y, aux = inference(layer, x.at[1, 2].set(jnp.nan), IDS, mask)
    alone_y, alone = inference(layer, x[:1], IDS[:1])
    assert relative_error(y[:1], alone_y) < LIMIT["float32"]
    assert not y[1].any()
    assert same_bits(aux.load, alone.load)
    assert same_bits(aux.topk_ids[:1], alone.topk_ids)
    assert (aux.topk_ids[1] == -1).all()
    assert set(aux.losses) == set(alone.losses)
    for loss_name, loss in alone.losses.items():
        np.testing.assert_allclose(aux.losses[loss_name], loss, rtol=1e-5, err_msg=loss_name)


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"expert_choice", "soft_moe", "hash"}))
@pytest.mark.quick("chain_of_experts")
def test_choices_of_an_earlier_call_can_be_made_again(name):
    """Those of training, noise among them; weights are of the later call."""
    layer = new_layer(name, np.random.default_rng(0))
    _, _, x, _, y, aux, _ = case(name)
    again_y, again = inference(layer, x, IDS, None, aux.topk_ids)
    assert same_bits(again.topk_ids, aux.topk_ids)
    if name != "noisy_top_k":
        assert relative_error(again_y, y) < LIMIT["float32"]
        assert relative_error(again.topk_weights, aux.topk_weights) < LIMIT["float32"]
    _, other = inference(layer, -x, IDS, None, aux.topk_ids)
    assert same_bits(other.topk_ids, aux.topk_ids)
    if name != "chain_of_experts":  # whose one expert a pass weighs 1
        assert not np.allclose(other.topk_weights, aux.topk_weights, rtol=1e-2)
    _, free = inference(layer, x, IDS, None, jnp.full_like(aux.topk_ids, -1))
    assert same_bits(free.topk_ids, inference(layer, x, IDS)[1].topk_ids)


@pytest.mark.parametrize("name", ["expert_choice", "soft_moe", "hash"])
@pytest.mark.quick("hash")
def test_choices_cannot_be_given_where_tokens_make_none(name):
    layer = new_layer(name)
    _, _, x, *_, aux, _ = case(name)
    kind = type(layer.config.router).__name__
    with pytest.raises(ValueError, match=f"topk_ids cannot be given to a layer with {kind}"):
        layer(x, token_ids=IDS, topk_ids=aux.topk_ids)


@every_router
@pytest.mark.quick("specialized")
def test_the_same_call_gives_the_same_bits(name):
    layer = new_layer(name, np.random.default_rng(0))
    _, _, x, *_ = case(name)
    assert same_bits(inference(layer, x, IDS), inference(layer, x, IDS))

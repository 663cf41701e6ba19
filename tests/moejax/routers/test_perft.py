"""PERFT: adapters against numpy, a frozen base, masks that train the adapters alone."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax import ROUTERS, AdapterParam, MoE, MoEConfig, Perft, TopKRouter, make_mesh, perft_mask
from moejax.models import AttentionConfig, BlockConfig, DecoderBlock
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error, same_bits
from tests.moejax.routers.layers import arrays_of, by_path
from tests.moejax.routers.reference import best, chosen_by, silu, softmax_of, switch_loss

CONFIG = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=8,
    top_k=2,
    router=TopKRouter(load_balance_loss=0.01),
    dtype=jnp.float32,
)
ADAPTERS = {"num_adapters": 6, "width": 4, "top_k": 2}
PARTS = ("gate", "down", "up")


class Model(nnx.Module):
    """An embedding before the layer, which PERFT does not train either."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (7, 16)))
        self.moe = Perft(MoE(CONFIG, rngs=rngs), **ADAPTERS, rngs=rngs)

    def __call__(self, ids):
        x = self.embedding[...][ids]
        y, aux = self.moe(x)
        return x + y, aux


def adapted(base, rng, **settings) -> Perft:
    """With an `up` that is not zero."""
    layer = Perft(base, **ADAPTERS, rngs=nnx.Rngs(3), **settings)
    layer.up[...] = normal(rng, *layer.up.shape)
    return layer


call = nnx.jit(lambda layer, x: layer(x))


@nnx.jit
def gradients_of(layer, x, target):
    def loss(layer, x):
        y, aux = layer(x)
        return (y * target).sum() + aux.loss

    return nnx.grad(loss, argnums=(0, 1))(layer, x)


def adapters_in_numpy(p, x, scale, activation):
    scores = softmax_of(x @ p["gate"])
    chosen = chosen_by(best(scores, ADAPTERS["top_k"]), ADAPTERS["num_adapters"])
    act = silu if activation == "silu" else lambda h: h
    y = sum((scores * chosen)[:, j, None] * (act(x @ p["down"][j]) @ p["up"][j]) for j in range(len(p["down"])))
    return scale * y, switch_loss(chosen, scores, ADAPTERS["top_k"])


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.quick("silu")
def test_values_and_gradients_equal_numpy(activation, rng):
    base = MoE(CONFIG, rngs=nnx.Rngs(0))
    layer = adapted(base, rng, activation=activation, scale=0.5, load_balance_loss=0.3)
    x, target = normal(rng, 12, 16), normal(rng, 12, 16)
    y, aux = call(layer, x)
    p, tokens = {name: float64(getattr(layer, name)[...]) for name in PARTS}, float64(x)

    def adapters(changed):
        return adapters_in_numpy(p | changed, tokens, 0.5, activation)

    expected, balance = adapters({})
    assert relative_error(y - call(base, x)[0], expected) < 2 * LIMIT["float32"]
    assert list(aux.losses) == ["adapter_load_balance"]
    np.testing.assert_allclose(aux.loss, 0.3 * balance, rtol=1e-5)
    load = nnx.jit(lambda layer, x: layer.adapter_load(x))(layer, x)
    assert int(load.tokens_per_expert.sum()) == 24

    of_layer, _ = gradients_of(layer, x, target)
    for name in PARTS:
        direction, step = rng.standard_normal(p[name].shape), 1e-6

        def at(sign, name=name, direction=direction, step=step):
            y, balance = adapters({name: p[name] + sign * step * direction})
            return (y * float64(target)).sum() + 0.3 * balance

        gradient = float64(of_layer[name][...])
        size = np.linalg.norm(gradient)
        assert size > 1e-3
        assert abs((gradient * direction).sum() - (at(1) - at(-1)) / (2 * step)) < 1e-4 * size, name


@pytest.mark.parametrize("name", ["noisy_top_k", "hash", None])
@pytest.mark.slow
def test_training_begins_with_the_frozen_layer(name, rng):
    base = MoE(CONFIG if name is None else ROUTERS[name](CONFIG), rngs=nnx.Rngs(0))
    layer = Perft(base, **ADAPTERS, rngs=nnx.Rngs(3))
    x, ids = normal(rng, 12, 16), jnp.arange(12)
    y, aux = nnx.jit(lambda layer, x: layer(x, token_ids=ids, train=True))(layer, x)
    base_y, base_aux = nnx.jit(lambda base, x: base(x, token_ids=ids, train=False))(base, x)
    assert same_bits(y, base_y)
    assert same_bits((aux.load, aux.topk_ids), (base_aux.load, base_aux.topk_ids))
    assert layer.causal


def test_it_takes_the_place_of_a_blocks_experts(rng):
    config = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=128, precision="w8a8")
    block = DecoderBlock(BlockConfig(AttentionConfig(128, 2, 2, 64, dtype=config.dtype), config), rngs=nnx.Rngs(0))
    x = normal(rng, 1, 6, 128)
    frozen, _ = block(x)
    block.feed_forward = Perft(block.feed_forward, **ADAPTERS, rngs=nnx.Rngs(3))
    for rounded in (None, block.quantized_for_training()):
        assert same_bits(block(x, rounded=rounded)[0], frozen)


@pytest.mark.slow
def test_no_gradient_reaches_the_base_and_one_passes_through_it(rng):
    base = MoE(CONFIG, rngs=nnx.Rngs(0))
    x, target = normal(rng, 12, 16), normal(rng, 12, 16)
    layer = Perft(base, **ADAPTERS, rngs=nnx.Rngs(3), load_balance_loss=0.0)
    of_layer, of_x = gradients_of(layer, x, target)
    assert not any(gradient.any() for path, gradient in by_path(of_layer).items() if path.startswith("base."))
    without_losses = nnx.jit(nnx.grad(lambda base, x: (base(x)[0] * target).sum(), argnums=1))
    expected = without_losses(base, x)
    assert relative_error(of_x, expected) < LIMIT["float32"]  # adapters add nothing yet
    assert of_layer["up"][...].any()


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.slow
def test_masked_positions_hold_no_token(ep, rng):
    x, up = normal(rng, 2, 5, 16), normal(rng, *(6, 4, 16))
    layer = Perft(MoE(CONFIG, rngs=nnx.Rngs(0), mesh=make_mesh(4) if ep > 1 else None), **ADAPTERS, rngs=nnx.Rngs(3))
    layer.up[...] = up
    masked = nnx.jit(lambda layer, x, mask: (layer(x, mask=mask), layer.adapter_load(x, mask=mask)))
    mask = jnp.array([[True] * 5, [False] * 5])
    (y, aux), load = masked(layer, x.at[1].set(jnp.nan), mask)
    alone_y, alone = call(layer, x[:1])
    assert relative_error(y[:1], alone_y) < LIMIT["float32"]
    assert not y[1].any()
    np.testing.assert_allclose(aux.loss, alone.loss, rtol=1e-5)
    assert int(load.tokens_per_expert.sum()) == 10
    assert int(load.unrouted) == 0


@pytest.mark.slow
def test_choices_of_the_base_layer_can_be_made_again(rng):
    layer, x = adapted(MoE(CONFIG, rngs=nnx.Rngs(0)), rng), normal(rng, 12, 16)
    _, aux = call(layer, x)
    again = nnx.jit(lambda layer, x: layer(x, topk_ids=aux.topk_ids))
    assert same_bits(again(layer, -x)[1].topk_ids, aux.topk_ids)


def masked(model):
    mask = perft_mask(model)
    frozen = jax.tree.map(operator.not_, mask)
    return optax.chain(optax.masked(optax.adamw(0.1), mask), optax.masked(optax.set_to_zero(), frozen))


@pytest.mark.parametrize("how", ["mask", "wrt"])
@pytest.mark.quick("mask")
def test_a_step_changes_the_adapters_and_nothing_else(how, rng):
    model = Model(rngs=nnx.Rngs(0))
    model.moe.up[...] = normal(rng, *model.moe.up.shape)
    before = {path: value.copy() for path, value in arrays_of(model).items()}
    wrt = nnx.Param if how == "mask" else AdapterParam
    optimizer = nnx.Optimizer(model, masked(model) if how == "mask" else optax.adamw(0.1), wrt=wrt)
    ids, target = jnp.asarray(rng.integers(0, 7, 12)), normal(rng, 12, 16)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y, aux = model(ids)
            return ((y - target) ** 2).mean() + aux.loss

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    after = arrays_of(model)
    changed = {path for path, value in before.items() if not np.array_equal(value, after[path])}
    assert changed == {f"moe.{part}" for part in PARTS}


def test_the_mask_works_on_trees_without_nnx():
    model = Model(rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = nnx.to_pure_dict(perft_mask(model))
    trained = [jax.tree_util.keystr(path) for path, is_trained in jax.tree.leaves_with_path(mask) if is_trained]
    assert sorted(trained) == [f"['moe']['{part}']" for part in sorted(PARTS)]
    assert jax.tree.structure(mask) == jax.tree.structure(params)


@pytest.mark.slow
def test_calls_outside_of_the_mesh_are_spread_as_those_of_the_base(rng):
    x = normal(rng, 8, CONFIG.hidden_size)

    def compiled():
        program = nnx.jit(lambda layer, x: layer(x)[0])
        return program.lower(layer, x).compile().cost_analysis()["flops"], program(layer, x)

    with jax.set_mesh(make_mesh(ep=4)):
        layer = Perft(MoE(CONFIG, rngs=nnx.Rngs(0)), **ADAPTERS, rngs=nnx.Rngs(3))
        inside = compiled()
    outside = compiled()
    assert outside[0] == inside[0]
    assert same_bits(outside[1], inside[1])


@pytest.mark.slow
def test_over_a_mesh_equals_one_chip(rng):
    """Ten tokens on four chips; six adapters, which two chips need not divide."""
    x, target = normal(rng, 2, 5, 16), normal(rng, 2, 5, 16)
    up = normal(rng, 6, 4, 16)

    def layer_and_gradients(mesh=None):
        layer = Perft(MoE(CONFIG, rngs=nnx.Rngs(0), mesh=mesh), **ADAPTERS | {"num_adapters": 6}, rngs=nnx.Rngs(3))
        layer.up[...] = up
        return call(layer, x)[0], gradients_of(layer, x, target)

    expected = layer_and_gradients()
    got = layer_and_gradients(make_mesh(ep=4))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "activation must be None (low rank) or 'silu' (bottleneck), got 'relu'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_adapters": 0}, "num_adapters must be at least 1, got 0"),
        ({"top_k": 7}, "top_k must be 1 to num_adapters=6, got 7"),
        ({"top_k": 0}, "top_k must be 1 to num_adapters=6, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with raises_saying(ValueError, message):
        Perft(MoE(CONFIG, rngs=nnx.Rngs(0)), **ADAPTERS | settings, rngs=nnx.Rngs(0))


def test_input_that_does_not_fit(rng):
    layer = Perft(MoE(CONFIG, rngs=nnx.Rngs(0)), **ADAPTERS, rngs=nnx.Rngs(0))
    with raises_saying(ValueError, "x must be [..., H] with hidden_size=16, got [4, 15]"):
        layer(normal(rng, 4, 15))

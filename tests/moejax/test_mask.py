"""What is masked is not there: real tokens fare as in the batch without it, on every mesh and with a capacity too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import ROUTERS, MoE, MoEConfig, Perft, TopKRouter, linen, make_mesh, moe, moe_experts
from tests.helpers import normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import random_params

BATCH, LENGTH, REAL = 32, 32, 24
"""A chip of 8 has 96 real rows, 128 with padding. XLA adds in another order on CPUs in products of fewer than 88."""
LOSSES = TopKRouter(
    scoring="sigmoid",
    correction_bias=True,
    load_balance_loss=0.1,
    sequence_balance_loss=0.2,
    z_loss=0.3,
)
CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    shared_intermediate_size=16,
    router=LOSSES,
    dtype=jnp.float32,
)


def padded(rng: np.random.Generator, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sequences x [B, N, H] with padding full of NaN strewn among the tokens, and the mask."""
    mask = np.zeros((x.shape[0], LENGTH), bool)
    for row in mask:
        row[rng.choice(LENGTH, x.shape[1], replace=False)] = True
    values = np.full((*mask.shape, x.shape[2]), np.nan, np.float32)
    values[mask] = np.asarray(x, np.float32).reshape(-1, x.shape[2])
    return jnp.asarray(values, x.dtype), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("config", "ep"))
def run(x, params, direction, mask, *, config, ep):
    def loss(x, params):
        y, aux = moe(x, params, config, mask=mask, mesh=make_mesh(ep) if ep > 1 else None)
        return (y.astype(jnp.float32) * direction).sum() + aux.loss, (y, aux)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)


@pytest.mark.parametrize(
    ("dtype", "capacity_factor", "ep"),
    [
        *(("bfloat16", factor, ep) for factor in (None, 1.0) for ep in (1, 2, 4, 8)),
        *(("float32", factor, ep) for factor in (None, 1.0) for ep in (1, 8)),
    ],
)
@pytest.mark.quick("bfloat16-1.0-4")
def test_real_tokens_fare_as_without_padding(ep, dtype, capacity_factor, rng):
    config = dataclasses.replace(CONFIG, dtype=jnp.dtype(dtype), capacity_factor=capacity_factor)
    params = jax.device_get(random_params(config, rng))  # on the host: no program has to slice it for the chips
    x, direction = (np.asarray(normal(rng, BATCH, REAL, 32, dtype=config.dtype)) for _ in range(2))
    direction = direction.astype(np.float32)
    padded_x, mask = jax.device_get(padded(rng, x))
    padded_direction = np.zeros(padded_x.shape, np.float32)
    padded_direction[mask] = direction.reshape(-1, 32)
    (_, (y, aux)), (dx, dparams) = run(x, params, direction, None, config=config, ep=ep)
    (_, (z, padded_aux)), (dz, padded_dparams) = run(padded_x, params, padded_direction, mask, config=config, ep=ep)

    of_real = np.asarray(mask).reshape(-1)
    assert same_bits(padded_aux.topk_ids.reshape(-1, 2)[of_real], aux.topk_ids.reshape(-1, 2))
    assert (np.asarray(padded_aux.topk_ids).reshape(-1, 2)[~of_real] == -1).all()
    assert same_bits(padded_aux.load, aux.load)
    assert (int(aux.load.dropped) > 0) == (capacity_factor is not None)
    real_z = z.reshape(-1, 32)[of_real].reshape(y.shape)
    assert same_bits(real_z, y) if dtype == "bfloat16" else relative_error(real_z, y) < 1e-6
    for name, loss in aux.losses.items():
        assert relative_error(padded_aux.losses[name], loss) < 1e-5
    assert not np.asarray(z, np.float32).reshape(-1, 32)[~of_real].any()
    assert not np.asarray(dz, np.float32).reshape(-1, 32)[~of_real].any()
    limit = 1e-5 if dtype == "float32" else 1e-2
    assert relative_error(dz.reshape(-1, 32)[of_real].reshape(x.shape), dx) < limit
    for got, expected in zip(jax.tree.leaves(padded_dparams), jax.tree.leaves(dparams), strict=True):
        assert relative_error(got, expected) < limit


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.slow
def test_the_balancing_bias_moves_by_real_tokens(ep, rng):
    x = normal(rng, BATCH, REAL, 32)
    padded_x, mask = padded(rng, x)
    biases = []
    for inputs, own in ((x, None), (padded_x, mask)):
        layer = MoE(CONFIG, rngs=nnx.Rngs(0), mesh=make_mesh(ep) if ep > 1 else None)
        _, aux = layer(inputs, mask=own)
        layer.update(aux)
        biases.append(layer.router.correction_bias[...])
    assert same_bits(*biases)
    assert np.asarray(biases[0]).any()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.slow
def test_every_router_passes_over_what_is_masked(name, rng):
    """Tokens that are masked, NaN or not, change nothing of the others, and come out as zeros."""
    config = ROUTERS[name](dataclasses.replace(CONFIG, router=TopKRouter()))
    layer = MoE(config, rngs=nnx.Rngs(params=0, router=1), deterministic=True)
    ids = jnp.asarray(rng.integers(0, 100, (BATCH, LENGTH)))
    mask = jnp.asarray(rng.random((BATCH, LENGTH)) < 0.75)
    x = normal(rng, BATCH, LENGTH, 32)
    call = nnx.jit(lambda layer, x: layer(x, mask=mask, token_ids=ids))
    y, aux = call(layer, x)
    z, other = call(layer, jnp.where(mask[..., None], x, jnp.nan))
    assert same_bits((y, aux), (z, other))
    assert not np.asarray(y)[~np.asarray(mask)].any()
    assert np.isfinite(np.asarray(y)).all()
    assert np.asarray(y)[np.asarray(mask)].any()


@pytest.mark.parametrize("name", ["expert_choice", "soft_moe"])
@pytest.mark.quick("soft_moe")
def test_routers_of_whole_sequences_see_real_tokens_alone(name, rng):
    layer = MoE(ROUTERS[name](dataclasses.replace(CONFIG, router=TopKRouter())), rngs=nnx.Rngs(0))
    x = normal(rng, BATCH, REAL, 32)
    padded_x, mask = padded(rng, x)
    call = nnx.jit(lambda layer, x, mask: layer(x, mask=mask)[0])
    assert relative_error(call(layer, padded_x, mask)[mask], call(layer, x, None).reshape(-1, 32)) < 1e-5


@pytest.mark.slow
def test_masked_slots_of_a_decoding_batch_in_every_face(rng):
    x = normal(rng, 6, 32)
    mask = jnp.array([True, False, True, True, False, False])
    layer = MoE(CONFIG, rngs=nnx.Rngs(0))
    y, aux = layer(x, mask=mask)
    assert int(aux.load.tokens_per_expert.sum()) == 3 * CONFIG.top_k
    as_function, _ = moe(x, layer.params(), CONFIG, mask=mask)
    from_choices, dropped = moe_experts(x, aux.topk_weights, aux.topk_ids, layer.params(), CONFIG, mask=mask)
    of_linen = linen.MoE(CONFIG)
    variables = of_linen.init(jax.random.key(0), x)
    in_linen, _ = of_linen.apply(variables, x, mask=mask)
    adapted, _ = Perft(layer, 4, 8, 2, rngs=nnx.Rngs(1))(x, mask=mask)
    assert same_bits(as_function, y)
    assert same_bits(from_choices, y)
    assert same_bits(adapted, y)  # adapters begin at zero
    assert int(dropped.sum()) == 0
    for each in (y, in_linen):
        assert not np.asarray(each)[~np.asarray(mask)].any()


def test_all_masked(rng):
    x = normal(rng, 2, 4, 32)
    layer = MoE(CONFIG, rngs=nnx.Rngs(0))
    y, aux = layer(x, mask=jnp.zeros((2, 4), bool))
    assert not np.asarray(y).any()
    assert int(aux.load.tokens_per_expert.sum()) == int(aux.load.unrouted) == 0
    assert np.isfinite(np.asarray(aux.loss))


def test_a_mask_that_does_not_fit():
    x = jnp.ones((2, 4, 32))
    layer = MoE(CONFIG, rngs=nnx.Rngs(0))
    with raises_saying(ValueError, "mask must be bool [2, 4]", "int32[2, 4]"):
        layer(x, mask=jnp.ones((2, 4), jnp.int32))
    with raises_saying(ValueError, "mask must be bool [2, 4]", "bool[2]"):
        layer(x, mask=jnp.ones(2, bool))


def test_known_nan_of_a_real_token_is_found_and_of_a_masked_one_is_not():
    x = jnp.ones((2, 4, 32)).at[1, 2].set(jnp.nan)
    layer = MoE(CONFIG, rngs=nnx.Rngs(0))
    with raises_saying(ValueError, "x holds NaN in 1 of 8 tokens (first: token 6)"):
        layer(x, mask=jnp.ones((2, 4), bool))
    y, _ = layer(x, mask=jnp.ones((2, 4), bool).at[1, 2].set(False))
    assert np.isfinite(np.asarray(y)).all()

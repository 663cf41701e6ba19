"""The layer from the router on: choices that come from elsewhere, few or many, on one chip and over a mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moejax import MoEConfig, Partition, dense_moe, make_mesh, moe, moe_experts, route
from tests.helpers import LIMIT, normal, raises_saying, relative_error
from tests.moejax.layers import random_params

CONFIG = MoEConfig(
    hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, shared_intermediate_size=16, dtype=jnp.float32
)


@pytest.fixture
def params(rng):
    return random_params(CONFIG, rng)


@functools.cache
def mesh_of(ep):
    return make_mesh(ep) if ep > 1 else None


@functools.partial(jax.jit, static_argnames=("max_choices", "ep"))
def experts(x, weights, ids, params, *, max_choices=None, ep=1):
    return moe_experts(x, weights, ids, params, CONFIG, max_choices=max_choices, mesh=mesh_of(ep))


@functools.partial(jax.jit, static_argnames=("max_choices", "ep"))
def gradients(x, weights, ids, params, *, max_choices=None, ep=1):
    def loss(x, weights, params):
        return (experts(x, weights, ids, params, max_choices=max_choices, ep=ep)[0] ** 2).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(x, weights, params)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.slow
def test_router_and_experts_are_the_layer(ep, params, rng):
    x = normal(rng, 10, 32)
    routing = route(x, params.router["kernel"], CONFIG)
    no_router = dataclasses.replace(params, router=None)
    y, dropped = experts(x, routing.topk_weights, routing.topk_ids, no_router, ep=ep)
    expected, _ = jax.jit(lambda x, params: moe(x, params, CONFIG, mesh=mesh_of(ep)))(x, params)
    assert relative_error(y, expected) < LIMIT["float32"]
    assert relative_error(y, dense_moe(x, params, CONFIG)) < LIMIT["float32"]
    np.testing.assert_array_equal(dropped, np.zeros(8))


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1")
def test_masked_tokens_take_no_expert_and_no_capacity(ep, params, rng):
    """All want expert 3, which has room for ⌈1 · 8 · 1 / 8⌉ of the eight that are real: the first of them."""
    config = dataclasses.replace(CONFIG, capacity_factor=1.0)
    x, mask = normal(rng, 2, 8, 32), jnp.arange(16).reshape(2, 8) >= 8
    ids, ones = jnp.full((2, 8, 1), 3), jnp.ones((2, 8, 1))
    y, dropped = moe_experts(x, ones, ids, params, config, mask=mask, mesh=mesh_of(ep))
    expected, _ = moe_experts(x[1, :1], ones[1, :1], ids[1, :1], params, CONFIG)
    assert relative_error(y[1, :1], expected) < LIMIT["float32"]
    assert not y[0].any()
    np.testing.assert_array_equal(dropped, [0, 0, 0, 7, 0, 0, 0, 0])


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1")
def test_ids_outside_of_the_experts_make_no_choice(ep, params, rng):
    x, weights = normal(rng, 8, 32), jnp.asarray(rng.random((8, 3)), jnp.float32)
    ids = rng.integers(0, 8, (8, 3)).astype(np.int8)
    ids[2, 1], ids[5] = -3, [8, 100, -128]
    made = (ids >= 0) & (ids < 8)
    y, _ = experts(x, weights, jnp.asarray(ids), params, ep=ep)
    expected, _ = experts(x, weights * made, jnp.asarray(np.where(made, ids, 0), jnp.int32), params, ep=1)
    assert relative_error(y, expected) < LIMIT["float32"]


@pytest.mark.parametrize("capacity_of", ["batch", "chip"])
@pytest.mark.slow
def test_repeated_experts_of_a_token_have_room_if_there_is_any(capacity_of, params, rng):
    """More choices of an expert on a chip than that has tokens; a capacity for all of them drops none."""
    config = dataclasses.replace(CONFIG, capacity_factor=8.0, capacity_of=capacity_of)
    x, weights = normal(rng, 16, 32), jnp.asarray(rng.random((16, 2)), jnp.float32)
    ids = jnp.full((16, 2), 3, jnp.int32)
    y, dropped = moe_experts(x, weights, ids, params, config, mesh=make_mesh(8))
    assert not dropped.any()
    assert relative_error(y, experts(x, weights, ids, params)[0]) < LIMIT["float32"]


def few_choices(rng):
    """Ids [64, E] of which 20 are not −1, all of the first 16 tokens and for experts 0 and 1; and weights."""
    ids = np.full((64, 8), -1, np.int32)
    tokens, experts = np.divmod(rng.permutation(32)[:20], 2)
    ids[tokens, experts] = experts
    return jnp.asarray(ids), normal(rng, 64, 8)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.slow
def test_few_choices_of_many_equal_all_experts_on_all_tokens(ep, params, rng):
    """On four chips all 20 choices go from the first to itself, in rounds of 8."""
    x, (ids, weights) = normal(rng, 64, 32), few_choices(rng)

    args = x, weights, ids, params
    made = np.where(np.asarray(ids) >= 0, np.asarray(weights), 0)
    every = x, jnp.asarray(made), jnp.broadcast_to(jnp.arange(8), (64, 8)), params
    y, _ = experts(*args, max_choices=20, ep=ep)
    assert relative_error(y, experts(*every)[0]) < LIMIT["float32"]
    bounded, expected = gradients(*args, max_choices=20, ep=ep), gradients(*every)
    of_weights = jnp.where(ids >= 0, expected[1], 0)
    for got, want in zip(
        jax.tree.leaves(bounded), jax.tree.leaves((expected[0], of_weights, expected[2])), strict=True
    ):
        assert relative_error(got, want) < LIMIT["float32"]


def test_rows_in_memory_are_those_of_the_choices(params, rng):
    x, (ids, weights) = normal(rng, 64, 32), few_choices(rng)

    def rows(**bounds) -> set[int]:
        text = str(jax.make_jaxpr(lambda x: moe_experts(x, weights, ids, params, CONFIG, **bounds))(x))
        return {number for number in (20, 512) if f"f32[{number},32]" in text}

    assert rows() == {512}
    assert rows(max_choices=20) == {20}


@pytest.mark.parametrize(
    ("ids", "weights", "changes", "parts"),
    [
        (np.zeros((9, 2), np.int32), np.ones((9, 2)), {}, ("leading dimensions of x [10, 32]", "int32[9, 2]")),
        (np.zeros((10, 2), np.int32), np.ones((10, 3)), {}, ("int32[10, 2] and float32[10, 3]",)),
        (np.zeros((10, 2)), np.ones((10, 2)), {}, ("topk_ids must be integer", "float")),
        (
            np.zeros((10, 2), np.int32),
            np.ones((10, 2)),
            {"scale_inputs": True, "top_k": 1},
            ("config.scale_inputs=True needs one choice a token, got K = 2",),
        ),
    ],
)
def test_choices_that_do_not_fit(ids, weights, changes, parts, params, rng):
    config = dataclasses.replace(CONFIG, **changes)
    with raises_saying(ValueError, *parts):
        moe_experts(normal(rng, 10, 32), jnp.asarray(weights), jnp.asarray(ids), params, config)


def test_a_bound_that_makes_no_sense(params, rng):
    ids = jnp.zeros((4, 2), jnp.int32)
    for bound in (0, 2.5, True):
        with raises_saying(ValueError, "max_choices must be a whole number of at least 1", f"got {bound}"):
            moe_experts(normal(rng, 4, 32), jnp.ones((4, 2)), ids, params, CONFIG, max_choices=bound)
    with raises_saying(ValueError, "topk_ids must hold at least one choice a token, got [4, 0]"):
        moe_experts(normal(rng, 4, 32), jnp.ones((4, 0)), ids[:, :0], params, CONFIG)


def test_parameters_that_do_not_fit(params, rng):
    with raises_saying(ValueError, "params.down must be [8, 16, 32], got [8, 15, 32]"):
        moe_experts(
            normal(rng, 4, 32),
            jnp.ones((4, 2)),
            jnp.zeros((4, 2), jnp.int32),
            dataclasses.replace(params, down=params.down[:, 1:]),
            CONFIG,
        )


@pytest.mark.parametrize(
    ("sizes", "repeated"), [({"expert": 1, "tensor": 2}, "tensor"), ({"expert": 2, "tensor": 2}, ("expert", "tensor"))]
)
@pytest.mark.quick("sizes0-tensor")
def test_a_bound_over_axes_that_repeat_the_tokens(sizes, repeated, params, rng):
    """Chips that share the experts' width hold the same tokens, and so each choice several times."""
    ids = jnp.asarray(np.where(rng.random((6, 8)) < 0.3, np.arange(8), -1), jnp.int32)
    x, weights, most = normal(rng, 6, 32), normal(rng, 6, 8), int((ids >= 0).sum())
    shape, names, axis_types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, names, axis_types, devices=jax.devices()[: math.prod(shape)])
    over = functools.partial(moe_experts, mesh=mesh, partition=Partition(repeated=repeated), max_choices=most)
    y, _ = jax.jit(lambda *args: over(*args, CONFIG))(x, weights, ids, params)
    assert relative_error(y, experts(x, weights, ids, params)[0]) < LIMIT["float32"]


def test_choices_beyond_the_bound_are_left_out(params, rng):
    """Those of the last experts, as rows lie by expert."""
    ids = jnp.array([[3, 7], [0, 5], [7, 2]], jnp.int32)
    x, weights = normal(rng, 3, 32), normal(rng, 3, 2)
    y, _ = experts(x, weights, ids, params, max_choices=4)
    assert relative_error(y, experts(x, weights, jnp.where(ids == 7, -1, ids), params)[0]) < LIMIT["float32"]


def test_nan_of_masked_tokens_reaches_no_gradient(params, rng):
    x, mask = normal(rng, 8, 32).at[5:].set(jnp.nan), jnp.arange(8) < 5
    ids, ones = jnp.asarray(rng.integers(0, 8, (8, 2))), jnp.ones((8, 2))

    def loss(x, params):
        return (moe_experts(x, ones, ids, params, CONFIG, mask=mask)[0] ** 2).sum()

    dx, dparams = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params)
    assert not dx[5:].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dparams))


@pytest.mark.slow
def test_a_capacity_of_each_chip_has_room_for_what_comes_over_a_tensor_axis(rng):
    """Every expert of one rank takes a quarter of all tokens, which four chips that share its width send it."""
    config = dataclasses.replace(CONFIG, top_k=1, capacity_factor=2.0, capacity_of="chip", shared_intermediate_size=0)
    params, x = random_params(config, rng), normal(rng, 64, 32)
    ids, ones = (jnp.arange(64) % 4)[:, None], jnp.ones((64, 1))
    mesh = jax.make_mesh((2, 4), ("expert", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:8])
    y, dropped = moe_experts(x, ones, ids, params, config, mesh=mesh)
    expected, _ = moe_experts(x, ones, ids, params, dataclasses.replace(config, capacity_factor=None))
    assert int(dropped.sum()) == 0
    assert relative_error(y, expected) < LIMIT["float32"]

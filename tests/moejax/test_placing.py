"""Layers whose hot experts have several slots: the same outputs, gradients, choices and drops as without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from bench.one_chip.cases import Case
from bench.one_chip.loads import make_load
from moejax import (
    MoE,
    MoEConfig,
    Quantization,
    TopKRouter,
    add_up_replicas,
    balance,
    dense_moe,
    make_mesh,
    moe,
    moe_experts,
    place,
    quantize_params,
    rank_loads,
)
from moejax.params import EXPERT_FIELDS
from sharding.replicas import Replicas
from tests.helpers import normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import clear_cut_tokens, random_params

CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=6,
    top_k=2,
    shared_intermediate_size=16,
    router=TopKRouter(load_balance_loss=0.1),
    expert_bias=True,
    dtype=jnp.float32,
)
EXPERTS = np.array([5, 0, 1, 2, 3, 4, 5, 1])
"""Slots of four chips: experts 5 and 1 on two of them."""


@pytest.fixture
def problem(rng):
    params = random_params(CONFIG, rng)
    x = clear_cut_tokens(28, CONFIG, params, rng).reshape(4, 7, -1)
    return params, x, normal(rng, *x.shape)


@functools.partial(jax.jit, static_argnames=("config", "ep", "axis_type"))
def results(x, params, direction, config, ep, axis_type=AxisType.Auto):
    """y and aux, and the gradients of x and of all that the routed experts have."""
    mesh = make_mesh(ep, axis_type=axis_type) if ep > 1 else None

    def loss(x, own):
        y, aux = moe(x, dataclasses.replace(params, **own), config, mesh=mesh)
        return (y * direction).sum(), (y, aux)

    own = {name: getattr(params, name) for name in EXPERT_FIELDS}
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, own)


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.quick("4-0.75")
def test_a_placed_layer_is_the_same_layer(ep, capacity_factor, problem):
    params, x, direction = problem
    config = dataclasses.replace(CONFIG, capacity_factor=capacity_factor)
    (_, (y, aux)), (dx, expected) = results(x, params, direction, config, 1)
    placed = place(params, EXPERTS)
    assert placed.down.shape[0] == 8
    (_, (placed_y, placed_aux)), (placed_dx, gradients) = results(x, placed, direction, config, ep)
    assert same_bits((placed_aux.load, placed_aux.topk_ids), (aux.load, aux.topk_ids))
    assert (int(aux.load.dropped) > 0) == (capacity_factor is not None)
    assert relative_error(placed_y, y) < 1e-6
    assert relative_error(placed_dx, dx) < 1e-5
    summed = add_up_replicas(dataclasses.replace(placed, **gradients), placed)
    for name, plain in expected.items():
        assert relative_error(getattr(summed, name), plain[EXPERTS]) < 1e-5, name


def test_a_gradient_through_place_adds_up_over_replicas(problem):
    params, x, direction = problem

    def loss(gate_up, move):
        own = dataclasses.replace(params, gate_up=gate_up)
        return (moe(x, move(own), CONFIG)[0] * direction).sum()

    one = jax.jit(jax.grad(functools.partial(loss, move=lambda own: place(own, EXPERTS))))(params.gate_up)
    plain = jax.jit(jax.grad(functools.partial(loss, move=lambda own: own)))(params.gate_up)
    assert relative_error(one, plain) < 1e-5


def test_weights_move_from_one_arrangement_to_another_and_back(problem):
    params, *_ = problem
    other = np.array([1, 2, 3, 0, 4, 5, 0, 2, 3])
    there = place(place(params, EXPERTS), other)
    assert same_bits(there, place(params, other))
    back = place(there, np.arange(6))
    assert back.replicas is None
    assert same_bits(back, params)
    shuffled = place(params, np.arange(6)[::-1])
    assert same_bits(shuffled.down, params.down[::-1])
    assert shuffled.replicas is not None


def test_another_arrangement_compiles_nothing_anew(problem):
    params, x, _ = problem
    calls = []

    @jax.jit
    def layer(x, params):
        calls.append(1)
        return moe(x, params, CONFIG)[0]

    outputs = [layer(x, place(params, experts)) for experts in (EXPERTS, EXPERTS[::-1], [0, 1, 2, 3, 4, 5, 0, 0])]
    assert len(calls) == 1
    assert max(relative_error(y, outputs[0]) for y in outputs) < 1e-6


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.slow
def test_a_module_over_a_mesh(axis_type, problem):
    params, x, _ = problem
    mesh = make_mesh(ep=2, dp=2, axis_type=axis_type)
    with jax.set_mesh(mesh):
        layer = MoE.from_params(params, CONFIG)
        layer.noise = nnx.data(nnx.Rngs(0).fork())
        y, aux = nnx.jit(lambda layer, x: layer(x))(layer, x)
        placed = layer.placed(EXPERTS)
        assert placed.down[...].addressable_shards[0].data.shape[0] == 4
        assert placed.noise is layer.noise
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed.replicas.get_value()))
        assert len(jax.tree.leaves(placed.replicas.get_value())[0].devices()) == 4
        assert jax.tree.leaves(nnx.state(placed, nnx.Param)["shared_down"])
        assert not {"gate_up", "down", "down_bias"} & set(nnx.state(placed, nnx.Param))
        placed_y, placed_aux = nnx.jit(lambda layer, x: layer(x))(placed, x)
    assert same_bits(placed_aux.load, aux.load)
    assert relative_error(placed_y, y) < 1e-6
    assert same_bits(placed.placed(np.arange(6)).params(), jax.device_get(params))


@pytest.mark.slow
def test_chips_that_only_more_slots_divide(problem):
    """Six experts on four chips, in eight slots."""
    params, x, _ = problem
    with jax.set_mesh(make_mesh(4)):
        y, _ = nnx.jit(lambda layer, x: layer(x))(MoE.from_params(place(params, EXPERTS), CONFIG), x)
    assert relative_error(y, moe(x, params, CONFIG)[0]) < 1e-6


def test_chips_do_not_begin_with_the_same_slot(rng):
    """A token on each of four chips, all for one expert: slots are told apart by what is written into them."""
    config = MoEConfig(32, 16, 4, 1, dtype=jnp.float32)
    placed = place(random_params(config, rng), [0, 1, 0, 2, 0, 3, 0, 1])
    scale = jnp.arange(1.0, 9.0).reshape(-1, 1, 1)
    marked = dataclasses.replace(placed, down=placed.down * scale)
    x = jnp.broadcast_to(normal(rng, 32), (4, 32))
    y, _ = moe_experts(x, jnp.ones((4, 1)), jnp.zeros((4, 1), jnp.int32), marked, config, mesh=make_mesh(4))
    sizes = np.linalg.norm(np.asarray(y), axis=1)
    np.testing.assert_allclose(sorted(sizes / sizes.min()), [1, 3, 5, 7], rtol=1e-5)


def test_weights_stay_split_under_jit_on_explicit_axes(problem):
    params, *_ = problem
    with jax.set_mesh(make_mesh(2, axis_type=AxisType.Explicit)):
        layer = MoE.from_params(params, CONFIG)
        down = jax.jit(lambda params: place(params, EXPERTS).down)(layer.params())
    assert down.sharding.spec[0] == "expert"
    assert same_bits(jax.device_get(down), params.down[EXPERTS])


def test_numpy_and_stacked_parameters(problem):
    params, *_ = problem
    assert same_bits(place(jax.tree.map(np.asarray, params), EXPERTS), place(params, EXPERTS))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), params)
    each = jax.vmap(lambda layer: place(layer, EXPERTS))(stacked)
    assert same_bits(each.down[2], params.down[EXPERTS])
    with raises_saying(ValueError, "params must be of one layer, down [E, I, H], got [6, 6, 16, 32]", "jax.vmap"):
        place(stacked, EXPERTS)


@pytest.mark.slow
def test_in_8_bits(rng):
    """Moved after they were rounded, as a server does."""
    config = dataclasses.replace(
        CONFIG,
        hidden_size=64,
        intermediate_size=32,
        shared_intermediate_size=32,
        expert_bias=False,
        precision="w8a8",
        quantization=Quantization(lhs_scaling="1x32", rhs_scaling="32x32"),
    )
    params = quantize_params(random_params(config, rng), config)
    x = normal(rng, 12, 64)
    layer = jax.jit(functools.partial(moe, config=config, mesh=make_mesh(4)))
    y, aux = layer(x, place(params, EXPERTS))
    expected, plain_aux = jax.jit(functools.partial(moe, config=config))(x, params)
    assert same_bits(aux.load, plain_aux.load)
    assert relative_error(y, expected) < 1e-2


def test_the_oracle_takes_a_placed_layer(problem):
    params, x, _ = problem
    dense = jax.jit(functools.partial(dense_moe, config=CONFIG))
    assert same_bits(dense(x, place(params, EXPERTS)), dense(x, params))


def test_rows_of_a_hot_expert_lie_evenly_over_the_ranks(rng):
    """All tokens choose expert 0 first: half of the rows, on the rank that has it, or spread over all four."""
    config = MoEConfig(32, 16, 8, 2, dtype=jnp.float32)
    x = normal(rng, 256, 32)
    ids = jnp.asarray(np.stack([np.zeros(256), rng.integers(1, 8, 256)], 1), jnp.int32)
    load = np.bincount(np.asarray(ids).ravel(), minlength=8)
    experts = balance(load, 12, ep=4)
    assert np.bincount(experts)[0] == 4
    placed = place(random_params(config, rng), experts)
    spread = jax.jit(placed.replicas.spread)
    slots = [spread(part, turn=chip) for chip, part in enumerate(np.split(np.asarray(ids), 4))]
    rows = np.bincount(np.concatenate(slots).ravel() // 3, minlength=4)
    assert rows.max() / rows.mean() < 1.1
    assert rank_loads(load, np.arange(8), 4).max() / (512 / 4) > 2
    assert relative_error(moe(x, placed, config)[0], moe(x, place(placed, np.arange(8)), config)[0]) < 1e-6


@pytest.mark.parametrize(("kind", "exponent"), [("text", 0.0), ("zipf", 0.5), ("zipf", 1.0), ("zipf", 1.5)], ids=str)
@pytest.mark.quick("text-*", "zipf-1.0")
def test_rows_of_the_busiest_of_32_chips(kind, exponent):
    """256 experts and 32 spare slots, on the loads of the benches: at most a tenth above the mean."""
    case = Case("topk", 1536, experts=256, k=8, hidden=512, dtype="fp32", load=kind, zipf_exponent=exponent)
    load = make_load(case)
    ids = jax.lax.top_k(load.x @ load.router, 8)[1]
    tokens_per_expert = np.bincount(np.asarray(ids).ravel(), minlength=256)
    replicas = Replicas.of(balance(tokens_per_expert, 288, ep=32), 256)
    spread = jax.jit(replicas.spread)
    slots = [spread(part, turn=chip) for chip, part in enumerate(np.split(np.asarray(ids), 32))]
    rows = np.bincount(np.concatenate(slots).ravel() // 9, minlength=32)
    assert rows.sum() == 1536 * 8
    assert rows.max() <= 1.1 * rows.mean()
    assert tokens_per_expert.reshape(32, 8).sum(1).max() > 1.5 * rows.mean()


def test_what_does_not_fit(problem):
    params, x, _ = problem
    with raises_saying(ValueError, "every expert needs a slot, and expert 4 has none"):
        place(params, [0, 1, 2, 3, 5])
    with raises_saying(ValueError, "params have 9 slots for experts, which ep=2 chips cannot share evenly"):
        moe(x, place(params, [0, 1, 2, 3, 4, 5, 0, 1, 2]), CONFIG, mesh=make_mesh(2))
    with jax.set_mesh(make_mesh(2)):
        layer = MoE.from_params(params, CONFIG)
        with raises_saying(ValueError, "the 2 chips that share the slots cannot share 9 of them evenly"):
            layer.placed([0, 1, 2, 3, 4, 5, 0, 1, 2])
    with raises_saying(TypeError, "params must be MoEParams, got dict"):
        place({}, EXPERTS)
    placed = place(params, EXPERTS)
    with raises_saying(ValueError, "params.down must be [8, 16, 32], got [6, 16, 32]"):
        moe(x, dataclasses.replace(placed, down=params.down), CONFIG)
    tables = placed.replicas
    for wrong in (
        dataclasses.replace(tables, slots=tables.slots[:6]),
        dataclasses.replace(tables, first=tables.first[:5]),
        dataclasses.replace(tables, count=tables.count.astype(jnp.float32)),
        dataclasses.replace(tables, count=tables.count[0]),
    ):
        with raises_saying(ValueError, "params.replicas must be int32 tables of the shapes"):
            moe(x, dataclasses.replace(placed, replicas=wrong), CONFIG)
    with raises_saying(TypeError, "params.replicas must be what moejax.place made"):
        moe(x, dataclasses.replace(placed, replicas=jnp.asarray(EXPERTS)), CONFIG)
    with raises_saying(ValueError, "experts must be known: call place outside jit"):
        jax.jit(lambda experts: place(params, experts).down)(jnp.asarray(EXPERTS))
    with raises_saying(ValueError, "gradients must be those of params"):
        add_up_replicas(params, placed)
    with raises_saying(TypeError, "gradients must be MoEParams, got NoneType"):
        add_up_replicas(None, placed)
    with raises_saying(ValueError, "params.replicas must be of num_experts=12, got 6"):
        moe(x, placed, dataclasses.replace(CONFIG, num_experts=12))
    with raises_saying(ValueError, "params must hold every expert once where they are split over expert_axis"):
        dense_moe(x, placed, CONFIG, expert_axis="expert")

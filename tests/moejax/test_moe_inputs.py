"""What `moe` makes of inputs that are wrong, strange, or spread in other ways than usual."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

from moejax import (
    MoE,
    MoEConfig,
    Partition,
    Quantization,
    TopKRouter,
    make_mesh,
    moe,
    quantize_params,
    with_changes,
)
from moejax.axes import axes_on
from moejax.routers import NoisyTopKRouter, SoftRouter
from tests.helpers import mesh_of, normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import clear_cut_tokens, random_params

CONFIG = MoEConfig(
    hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, shared_intermediate_size=16, dtype=jnp.float32
)


@pytest.fixture
def params(rng):
    return random_params(CONFIG, rng)


def with_nan(rng) -> jax.Array:
    return normal(rng, 6, 32).at[2, 5].set(jnp.nan)


@pytest.mark.parametrize("ep", [1, 4])
def test_nan_is_refused_where_it_can_be_seen(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    with raises_saying(ValueError, "x holds NaN in 1 of 6 tokens", "first: token 2"):
        moe(with_nan(rng), params, CONFIG, mesh=mesh)
    x = with_nan(rng)
    with raises_saying(ValueError, "x holds NaN in 1 of 6 tokens"):  # a constant of the traced function
        jax.jit(lambda params: moe(x, params, CONFIG, mesh=mesh))(params)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1")
def test_nan_under_jit_stays_with_its_token(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    y, _ = jax.jit(lambda x: moe(x, params, CONFIG, mesh=mesh))(with_nan(rng))
    np.testing.assert_array_equal(np.isnan(y).any(1), np.arange(6) == 2)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1")
def test_nan_of_masked_tokens_is_not_looked_at(ep, params, rng):
    mesh, mask = make_mesh(ep) if ep > 1 else None, jnp.arange(6) != 2
    y, aux = moe(with_nan(rng), params, CONFIG, mask=mask, mesh=mesh)
    np.testing.assert_array_equal(np.abs(np.asarray(y)).sum(1) > 0, mask)
    assert np.isfinite(y).all()
    assert np.isfinite(aux.topk_weights[mask]).all()
    with raises_saying(ValueError, "x holds NaN in 1 of 6 tokens"):
        moe(with_nan(rng), params, CONFIG, mask=jnp.ones(6, bool), mesh=mesh)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.quick("1")
def test_a_router_that_is_nan_is_refused_where_it_can_be_seen(ep, params, rng):
    mesh, kernel = make_mesh(ep) if ep > 1 else None, params.router["kernel"].at[3, 1].set(jnp.nan)
    broken = dataclasses.replace(params, router={"kernel": kernel})
    with raises_saying(ValueError, "params.router['kernel'] holds NaN"):
        moe(normal(rng, 6, 32), broken, CONFIG, mesh=mesh)
    y, _ = jax.jit(lambda x, params: moe(x, params, CONFIG, mesh=mesh))(normal(rng, 6, 32), broken)
    assert np.isnan(y).all()


def test_layers_that_are_alike_are_traced_once(params, rng):
    """Kernels take long to lower: a model of many layers must not lower each anew."""

    def model(x, layers):
        for layer in layers:
            x = x + moe(x, layer, CONFIG)[0]
        return x.sum()

    def programs(jaxpr) -> list:
        """Those that each layer runs, by identity."""
        return [id(e.params["jaxpr"]) for e in jaxpr.eqns if "_on_chip" in str(e.params.get("name"))]

    for function in (model, jax.grad(model)):
        found = programs(jax.make_jaxpr(function)(normal(rng, 6, 32), [params] * 5).jaxpr)
        assert len(found) >= 5
        assert len(found) / len(set(found)) == 5


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (np.ones((4, 32), np.int32), ("x must be BF16, FP16 or float32", "got int32", "embed token ids first")),
        (np.ones((4, 31), np.float32), ("x must be [..., H] with hidden_size=32", "got [4, 31]")),
        (np.ones((0, 32), np.float32), ("x must hold at least one token", "got [0, 32]")),
    ],
)
def test_inputs_that_do_not_fit(x, parts, params):
    with raises_saying(ValueError, *parts):
        moe(jnp.asarray(x), params, CONFIG)


def test_a_mesh_without_the_axis_is_refused(params, rng):
    mesh = mesh_of(data=2, model=4)
    with raises_saying(ValueError, "the mesh has no axis 'expert'", "only ('data', 'model')", "Partition(expert=...)"):
        moe(normal(rng, 8, 32), params, CONFIG, mesh=mesh)


TRAINED = with_changes(
    CONFIG,
    load_balance_loss=0.1,
    sequence_balance_loss=0.1,
    z_loss=0.1,
    router_bias=True,
    expert_bias=True,
    shared_gate=True,
    capacity_factor=1.0,
)
LAYOUTS = {
    "fsdp": ({"fsdp": 8, "expert": 2}, None),
    "tensor": ({"expert": 2, "tensor": 4}, None),
    "all": ({"data": 2, "fsdp": 2, "expert": 2, "tensor": 2}, None),
    "every chip with all experts": ({"data": 2, "tensor": 4}, Partition(expert=None)),
    "axes of any name": ({"replica": 2, "model": 4}, Partition(expert="model", tokens=("replica", "model"))),
    "two axes for each": ({"a": 2, "b": 2, "c": 2, "d": 2}, Partition(expert=("a", "b"), mlp=("c", "d"))),
    "weights over all but experts": ({"data": 2, "z": 2, "e": 4}, Partition(expert="e", embed=("z", "data"))),
    "repeated": ({"idle": 2, "expert": 4}, Partition(repeated="idle")),
    "positions over chips": ({"data": 3, "expert": 4}, Partition(tokens=("data", ("expert",)))),
}


def values_and_gradients(x, mask, params, direction, mesh=None, partition=None):
    def loss(x, params):
        y, aux = moe(x, params, TRAINED, mask=mask, mesh=mesh, partition=partition)
        return (y * direction).sum() + aux.loss, (y, aux)

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        (_, (y, aux)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    return (y, aux.losses, aux.topk_weights, gradients), (aux.load, aux.topk_ids)


@pytest.mark.parametrize(
    ("name", "axis_type"), [*((name, AxisType.Auto) for name in LAYOUTS), ("all", AxisType.Explicit)], ids=str
)
@pytest.mark.quick("axes of any name-*")
def test_every_partition_equals_one_chip(name, axis_type, rng):
    """Values, losses, load, drops, and the gradients of x and of every parameter."""
    sizes, partition = LAYOUTS[name]
    mesh = mesh_of(axis_type, **sizes)
    params = random_params(TRAINED, rng)
    x, direction = clear_cut_tokens(36, TRAINED, params, rng).reshape(3, 12, 32), normal(rng, 3, 12, 32)
    mask = jnp.asarray(rng.random((3, 12)) < 0.8)
    alone, counts_alone = values_and_gradients(x, mask, params, direction)
    got, counts = values_and_gradients(x, mask, params, direction, mesh, partition)
    assert same_bits(counts, counts_alone)
    assert int(counts[0].dropped) > 0
    for (path, leaf), ref in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(alone), strict=True):
        assert relative_error(leaf, ref) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["fsdp", "tensor", "all", "axes of any name"])
@pytest.mark.slow
def test_in_8_bits_over_every_kind_of_axis(name, rng):
    """Weights that are rounded in every call, and those that are held in 8 bits."""
    sizes, partition = LAYOUTS[name]
    mesh = mesh_of(**sizes)
    q = Quantization(lhs_scaling="1x32", rhs_scaling="32x32")
    config = MoEConfig(
        hidden_size=256,
        intermediate_size=128,
        num_experts=8,
        top_k=2,
        shared_intermediate_size=128,
        precision="w8a8",
        quantization=q,
        dtype="float32",
    )
    params, x = random_params(config, rng), normal(rng, 3, 12, 256)
    layer = jax.jit(functools.partial(moe, config=config))
    over = jax.jit(functools.partial(moe, config=config, mesh=mesh, partition=partition))
    y, aux = layer(x, params)
    for weights in (params, quantize_params(params, config)):
        mesh_y, mesh_aux = over(x, weights)
        assert same_bits(mesh_aux.topk_ids, aux.topk_ids)
        assert relative_error(mesh_y, y) < 1e-2


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"expert": 2, "tensor": 3}, ("intermediate_size=16 is not divisible by the 3 chips", "Partition(mlp=None)")),
        ({"expert": 2, "fsdp": 3}, ("hidden_size=32 is not divisible by the 3 chips", "Partition(embed=None)")),
        ({"expert": 3}, ("num_experts=8 is not divisible by ep=3",)),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide(sizes, parts, params, rng):
    mesh = mesh_of(**sizes)
    with raises_saying(ValueError, *parts):
        moe(normal(rng, 8, 32), params, CONFIG, mesh=mesh)


def test_a_width_whose_parts_no_block_of_scales_divides():
    config = MoEConfig(256, 768, 8, 2, precision="w8a8")
    with raises_saying(ValueError, "'w8a8' does not fit intermediate_size=768 in 4 parts", "192", "128"):
        MoE(config, rngs=nnx.Rngs(0), mesh=mesh_of(expert=2, tensor=4))


def test_rows_that_travel_in_blocks_that_do_not_divide(rng):
    config = MoEConfig(384, 256, 8, 2, precision="w8a8")
    x = jnp.ones((8, 384), jnp.bfloat16)
    with raises_saying(ValueError, "scales ('1x128') of a row that travels=3 is not divisible by the 2 chips"):
        moe(x, random_params(config, rng), config, mesh=mesh_of(expert=2, tensor=2))


def test_flax_rules_that_name_tokens_alone_split_nothing_else():
    with linen.logical_axis_rules([("tokens", ("data", "expert"))]):
        axes = axes_on(mesh_of(data=2, expert=4), None, CONFIG)
    assert (axes.expert, axes.embed, axes.mlp, axes.tokens) == ((), (), (), ("data", "expert"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [[1.0] * 32]}, "x must be an array, got list"),
        ({"mask": True}, "mask must be an array, got bool"),
        ({"topk_ids": [[0, 1]]}, "topk_ids must be an array, got list"),
        ({"params": {"down": 0}}, "params must be MoEParams, got dict"),
        ({"partition": "expert"}, "partition must be a moejax.Partition, got str"),
        ({"mesh": 4}, "mesh must be a jax.sharding.Mesh, such as make_mesh(ep=4), got int"),
    ],
)
def test_what_is_not_of_the_type_that_is_asked_for(changes, message, params, rng):
    given = {"x": normal(rng, 8, 32), "params": params, "config": CONFIG} | changes
    given |= {"mesh": mesh_of(expert=2)} if "partition" in changes else {}
    with raises_saying(TypeError, message):
        moe(**given)


def test_flax_rules_say_the_partition(params, rng):
    x = normal(rng, 8, 32)
    rules = [("expert", "model"), ("tokens", ("replica", "model"))]
    with linen.logical_axis_rules(rules), jax.set_mesh(mesh_of(replica=2, model=4)):
        y, _ = moe(x, params, CONFIG)
    assert relative_error(y, moe(x, params, CONFIG)[0]) < 1e-5


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("sizes", "partition"),
    [
        ({"expert": 4}, None),
        ({"expert": 1}, None),
        ({"data": 1, "expert": 4}, None),
        ({"data": 1, "expert": 4}, Partition(tokens="expert")),
        ({"data": 1, "expert": 1}, Partition(tokens=())),
        ({"data": 2, "expert": 1}, None),
        ({"fsdp": 1, "expert": 2}, None),
        ({"other": 1, "expert": 4}, None),
        ({"other": 1, "expert": 4}, Partition(repeated="other")),
    ],
    ids=str,
)
@pytest.mark.quick("*'data': 1, 'expert': 4*-None-True", "*'other': 1, 'expert': 4*-None-True")
def test_inside_another_shard_map(sizes, partition, check_vma, params, rng):
    """Two stages with a layer each, over an axis that the layer knows nothing of, beside axes of one chip too."""
    x, direction = normal(rng, 2, 12, 32), normal(rng, 2, 12, 32)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def loss(x, params, direction):
        y, aux = moe(x, params, with_changes(CONFIG, load_balance_loss=0.1), partition=partition)
        return ((y - direction) ** 2).sum() + aux.loss

    def in_stages(x, layers):
        def stage(*args):
            return loss(*jax.tree.map(lambda leaf: leaf[0], args))[None]

        spec = PartitionSpec("stage")
        over = {"in_specs": spec, "out_specs": spec, "axis_names": {"stage"}, "check_vma": check_vma}
        return jax.shard_map(stage, **over)(x, layers, direction).sum()

    def one_by_one(x, layers):
        return sum(loss(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], layers), direction[i]) for i in range(2))

    expected = jax.jit(jax.value_and_grad(one_by_one, argnums=(0, 1)))(x, layers)
    with jax.set_mesh(mesh_of(stage=2, **sizes)):
        got = jax.jit(jax.value_and_grad(in_stages, argnums=(0, 1)))(x, layers)
    for leaf, ref in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(leaf, ref) < 1e-5


@pytest.mark.parametrize("router", [TopKRouter(), SoftRouter()], ids=["a token", "a sequence"])
def test_what_no_axis_splits_inside_another_shard_map(router, rng):
    """Over axes of one chip, which are named all the same."""
    config = with_changes(CONFIG, router=router)
    params, x = random_params(config, rng), normal(rng, 2, *(() if isinstance(router, TopKRouter) else (3,)), 32)

    def one(x, params):
        return moe(x, params, config)[0]

    over = {"in_specs": (PartitionSpec("stage"), PartitionSpec()), "out_specs": PartitionSpec("stage")}
    in_stages = jax.shard_map(lambda x, params: one(x[0], params)[None], **over, axis_names={"stage"})
    staged, plain = (
        jax.jit(jax.value_and_grad(lambda x, params, run=run: jnp.square(run(x, params)).sum(), argnums=(0, 1)))
        for run in (in_stages, jax.vmap(one, (0, None)))
    )
    expected = plain(x, params)
    with jax.set_mesh(mesh_of(stage=2, data=1, expert=1)):
        found = staged(x, params)
    for leaf, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(leaf, reference) < 1e-5


def test_the_noise_of_a_mesh_of_axes_of_one_chip(rng):
    config = with_changes(CONFIG, router=NoisyTopKRouter())
    params, x, key = random_params(config, rng), normal(rng, 8, 32), jax.random.key(0)
    y, _ = moe(x, params, config, key=key, mesh=mesh_of(data=1, expert=2))
    assert relative_error(y, moe(x, params, config, key=key)[0]) < 1e-5


def test_one_vector_is_one_token(params, rng):
    x = normal(rng, 3, 32)
    y, _ = moe(x[1], params, CONFIG)
    assert relative_error(y, moe(x, params, CONFIG)[0][1]) < 1e-5


@pytest.mark.parametrize("ep", [1, 8])
@pytest.mark.slow
def test_equal_inputs_give_equal_bits(ep, params, rng):
    mesh = make_mesh(ep) if ep > 1 else None
    x = normal(rng, 57, 32)
    step = jax.jit(jax.value_and_grad(lambda x, params: moe(x, params, CONFIG, mesh=mesh)[0].sum(), argnums=(0, 1)))
    assert same_bits(step(x, params), step(x, params))


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize("capacity_of", ["batch", "chip"])
@pytest.mark.quick("chip-4")
def test_capacity_drops_are_counted_and_add_nothing(capacity_of, ep, params, rng):
    """Of the batch, four of sixteen choices of an expert, wherever they are made; else so many of each chip."""
    mesh = make_mesh(ep) if ep > 1 else None
    x = jnp.broadcast_to(normal(rng, 1, 32), (16, 32))  # every token wants the same two experts
    config = dataclasses.replace(CONFIG, capacity_factor=1.0, capacity_of=capacity_of, shared_intermediate_size=0)
    params = dataclasses.replace(params, shared_gate_up=None, shared_down=None)
    y, aux = moe(x, params, config, mesh=mesh)
    parts = ep if capacity_of == "chip" else 1
    per_chip = 16 // parts
    capacity = -(-per_chip * 2 // 8)
    assert int(aux.load.dropped) == parts * 2 * (per_chip - capacity)
    assert sorted(np.flatnonzero(aux.load.dropped_per_expert)) == sorted(np.flatnonzero(aux.load.tokens_per_expert))
    kept = np.abs(np.asarray(y)).reshape(parts, per_chip, 32).sum(2) > 0
    np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(per_chip) < capacity, (parts, per_chip)))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"mask": np.ones((3, 4), bool)}, ("mask must be bool [2, 4]", "got bool[3, 4]")),
        ({"mask": np.ones((2, 4))}, ("mask must be bool [2, 4]", "got float")),
        ({"token_ids": np.ones((2, 4))}, ("token_ids must be integers of shape [2, 4]", "got float")),
        (
            {"topk_ids": np.zeros((2, 4, 3), int)},
            ("topk_ids must be integers of shape [2, 4, 2]", "by TopKRouter", "3]"),
        ),
        ({"topk_ids": np.zeros((2, 4, 2))}, ("topk_ids must be integers of shape [2, 4, 2]", "got float")),
        ({"topk_ids": np.full((2, 4, 2), 8)}, ("topk_ids must be below num_experts=8", "got 8")),
    ],
    ids=str,
)
def test_what_comes_with_the_tokens_and_does_not_fit(given, parts, params, rng):
    with raises_saying(ValueError, *parts):
        moe(normal(rng, 2, 4, 32), params, CONFIG, **{name: jnp.asarray(value) for name, value in given.items()})

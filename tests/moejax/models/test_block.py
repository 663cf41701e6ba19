"""The whole block: values, gradients, masks, meshes."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import MoEConfig, Partition, TopKRouter, dense_moe, make_mesh
from moejax.models import MLP, AttentionConfig, BlockConfig, DecoderBlock, KVCache, MLPConfig
from moejax.models import mlp as dense
from moejax.routers import ExpertChoiceRouter, HashRouter
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.moejax.models import oracle

ATTENTION = AttentionConfig(32, 4, 2, 8, dtype=jnp.float32)
DENSE = BlockConfig(ATTENTION, MLPConfig(32, 16, dtype=jnp.float32))
EXPERTS = BlockConfig(ATTENTION, MoEConfig(32, 16, 8, 2, router=TopKRouter(load_balance_loss=0.01), dtype=jnp.float32))


def new_block(config: BlockConfig, **settings) -> DecoderBlock:
    return DecoderBlock(config, rngs=nnx.Rngs(0), **settings)


@nnx.jit
def call(block, x, mask=None):
    return block(x, mask=mask)


def test_values_and_gradients_equal_the_oracles(rng):
    """The gradient along a direction is the oracle's central difference in float64."""
    block, x = new_block(DENSE), normal(rng, 2, 5, 32)
    graph, state = nnx.split(block)
    params, direction = oracle.values(state), normal(rng, 2, 5, 32)
    y, _ = call(block, x)
    assert relative_error(y, oracle.dense_block(params, float64(x), DENSE)) < LIMIT["float32"]

    def objective(state, x):
        return (nnx.merge(graph, state)(x)[0] * direction).sum()

    by_state, by_x = jax.jit(jax.grad(objective, argnums=(0, 1)))(state, x)
    gradients = {**oracle.values(by_state), "x": float64(by_x)}
    assert gradients.keys() == {*params, "x"}
    for name, gradient in gradients.items():
        toward = rng.standard_normal(gradient.shape)
        step = 1e-5

        def moved(by, name=name, toward=toward):
            at = {**params, "x": float64(x)}
            at[name] = at[name] + by * toward
            return (oracle.dense_block(at, at["x"], DENSE) * float64(direction)).sum()

        expected = (moved(step) - moved(-step)) / (2 * step)
        scale = np.linalg.norm(gradient) * np.linalg.norm(toward)
        assert abs((gradient * toward).sum() - expected) < 1e-5 * scale, name


def test_with_experts_it_is_the_layer_after_the_attention(rng):
    block, x = new_block(EXPERTS), normal(rng, 2, 5, 32)
    y, aux = call(block, x)

    @nnx.jit
    def in_parts(block, x):
        attended = x + block.attention(block.attention_norm(x))
        normed = block.feed_forward_norm(attended)
        return attended, dense_moe(normed, block.feed_forward.params(), EXPERTS.feed_forward)

    attended, layer = in_parts(block, x)
    assert relative_error(y - attended, layer) < LIMIT["float32"]
    assert aux.load.tokens_per_expert.sum() == 2 * 2 * 5
    assert aux.loss > 0


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.quick("experts")
def test_masked_positions_come_out_as_they_came_in_and_are_seen_by_none(rng, config):
    block, x = new_block(config), normal(rng, 2, 6, 32)
    mask = jnp.array([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    y, _ = call(block, x, mask)
    np.testing.assert_array_equal(y[~mask], x[~mask])
    others = jnp.where(mask[..., None], x, 100.0)
    np.testing.assert_array_equal(call(block, others, mask)[0][mask], y[mask])


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.quick("dense")
def test_over_a_mesh_it_is_the_same(rng, config):
    alone, x = new_block(config), normal(rng, 4, 6, 32)
    cache = KVCache.empty(ATTENTION, num_slots=4, max_length=8)
    slots, token = jnp.arange(4)[::-1], normal(rng, 4, 1, 32)

    @nnx.jit
    def steps(block, x, cache):
        y, _, cache = block.prefill(x, cache, slots=slots)
        return y, *block.decode(token, cache)[::2]

    expected = steps(alone, x, cache)
    mesh = make_mesh(ep=2, dp=2)
    with jax.set_mesh(mesh):
        block = new_block(config)
        spread = NamedSharding(mesh, PartitionSpec(("data", "expert")))
        result = steps(block, *jax.device_put((x, cache), spread))
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < LIMIT["float32"]


@pytest.mark.parametrize("feed_forward", [MLPConfig(512, 256), MoEConfig(512, 256, 8, 2)], ids=["dense", "experts"])
@pytest.mark.parametrize("is_given", [False, True], ids=["made on the mesh", "given the mesh"])
def test_a_block_of_a_mesh_is_lowered_for_chips_with_kernels(feed_forward, is_given):
    """Of which no compiler splits the work over a mesh."""
    mesh, config = make_mesh(ep=2, dp=2), BlockConfig(AttentionConfig(512, 4, 2, 128), feed_forward)
    with jax.set_mesh(mesh) if not is_given else contextlib.nullcontext():
        graph, state = nnx.split(new_block(config, mesh=mesh if is_given else None))
    x = jax.ShapeDtypeStruct((8, 128, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    traced = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0]).trace(state, x)
    kernels = traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
    assert (kernels > 0) == isinstance(feed_forward, MoEConfig)  # a dense network is traced as on the CPU at hand


@pytest.mark.slow
def test_over_a_mesh_of_explicit_axes_gradients_are_the_same(rng):
    x = normal(rng, 4, 6, 32)

    @nnx.jit
    def gradient(block, x):
        return nnx.grad(lambda block: (block(x)[0] ** 2).sum())(block)

    expected = gradient(new_block(EXPERTS), x)
    mesh = make_mesh(ep=2, dp=2, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "expert"))))
        result = gradient(new_block(EXPERTS), spread)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < LIMIT["float32"]


def test_a_mesh_that_would_repeat_work_is_refused():
    mesh = jax.make_mesh((2,), ("elsewhere",), devices=jax.devices()[:2])
    network = MLP(DENSE.feed_forward, rngs=nnx.Rngs(0), mesh=mesh, partition=Partition(expert=None))
    with raises_saying(ValueError, "'elsewhere'", "same work"):
        network(jnp.zeros((2, 3, 32)))


def test_active_of_another_number_of_slots_is_named():
    block, x = new_block(DENSE), jnp.zeros((4, 1, 32))
    cache = KVCache.empty(ATTENTION, num_slots=4, max_length=8)
    with raises_saying(ValueError, "active must be bool [4], got", "bool[3]"):
        block.decode(x, cache, active=jnp.ones(3, bool))


def test_parts_that_do_not_fit_together_are_refused():
    with raises_saying(ValueError, "feed_forward.hidden_size must be that of attention, 32, got 64"):
        BlockConfig(ATTENTION, MLPConfig(64, 16, dtype=jnp.float32))
    with raises_saying(ValueError, "feed_forward.dtype must be that of attention"):
        BlockConfig(ATTENTION, MLPConfig(32, 16))
    with raises_saying(TypeError, "feed_forward must be MoEConfig or MLPConfig, got AttentionConfig"):
        BlockConfig(ATTENTION, ATTENTION)
    with raises_saying(ValueError, "unknown activation 'swish'"):
        MLPConfig(32, 16, activation="swish")
    with raises_saying(TypeError, "config must be BlockConfig(attention, feed_forward), got AttentionConfig"):
        new_block(ATTENTION)
    with raises_saying(TypeError, "rngs must be nnx.Rngs, such as nnx.Rngs(0), got int"):
        DecoderBlock(DENSE, rngs=0)


def test_a_router_that_looks_ahead_is_said_where_tokens_come_one_by_one(rng):
    experts = MoEConfig(32, 16, 8, 2, router=ExpertChoiceRouter(), dtype=jnp.float32)
    block = new_block(BlockConfig(ATTENTION, experts))
    cache = KVCache.empty(ATTENTION, num_slots=1, max_length=9)
    with pytest.warns(UserWarning, match="decoding differs from whole sequences"):
        block.prefill(normal(rng, 1, 4, 32), cache, slots=jnp.array([0]))


def test_a_router_that_goes_by_ids_is_given_them_in_every_way_to_run_a_block(rng):
    experts = MoEConfig(32, 16, 8, 2, router=HashRouter(vocabulary=50), dtype=jnp.float32)
    block, x = new_block(BlockConfig(ATTENTION, experts)), normal(rng, 2, 5, 32)
    ids, slots = jnp.asarray(rng.integers(0, 50, (2, 5))), jnp.arange(2)
    expected, _ = block(x, token_ids=ids)
    cache = KVCache.empty(ATTENTION, num_slots=2, max_length=5)
    y, _, cache = block.prefill(x[:, :4], cache, slots=slots, token_ids=ids[:, :4])
    last, _, _ = block.decode(x[:, 4:], cache, token_ids=ids[:, 4:])
    assert relative_error(jnp.concatenate([y, last], axis=1), expected) < LIMIT["float32"]
    with raises_saying(ValueError, "token_ids must be given for hash routing", "or the block around it"):
        block.decode(x[:, 4:], cache)


def test_arrays_split_over_a_mesh_of_explicit_axes_need_it(rng):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    x = jax.device_put(normal(rng, 2, 4, 32), NamedSharding(mesh, PartitionSpec("expert")))
    block = new_block(EXPERTS)
    with raises_saying(ValueError, "x is split over the mesh {'expert': 2}", "jax.set_mesh(mesh)"):
        block.feed_forward(x)
    with raises_saying(ValueError, "x must be whole, or split over a mesh of Auto axes"):
        block.attention.prefill(x, KVCache.empty(ATTENTION, num_slots=2, max_length=4), slots=jnp.arange(2))


@pytest.mark.parametrize("fault", [jnp.nan, jnp.inf])
def test_what_is_masked_does_no_harm_whatever_it_is(rng, fault):
    block, x, mask = new_block(DENSE), normal(rng, 1, 5, 32), jnp.array([[1, 1, 0, 1, 0]], bool)

    def of_real(x):
        return jnp.where(mask[..., None], block(x, mask=mask)[0], 0).sum()

    broken = jnp.where(mask[..., None], x, fault)
    np.testing.assert_array_equal(call(block, broken, mask)[0][mask], call(block, x, mask)[0][mask])
    np.testing.assert_array_equal(jax.grad(of_real)(broken)[mask], jax.grad(of_real)(x)[mask])


def test_what_is_masked_has_no_share_in_gradients_of_a_network_alone(rng):
    network, x, mask = MLP(DENSE.feed_forward, rngs=nnx.Rngs(0)), normal(rng, 1, 4, 32), jnp.array([[1, 0, 1, 0]], bool)
    graph, state = nnx.split(network)

    def loss(state, x):
        return (nnx.merge(graph, state)(x, mask=mask) ** 2).sum()

    found = [jax.grad(loss, argnums=(0, 1))(state, jnp.where(mask[..., None], x, fault)) for fault in (0, jnp.nan)]
    for clean, broken in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(clean, broken)


def test_a_network_by_dots_is_rounded_once(rng):
    """What a gate shuts may be too large for 16 bits."""
    config = MLPConfig(32, 16, dtype=jnp.float16)
    gate_up = jnp.stack([jnp.full((32, 16), -100.0), jnp.ones((32, 16))], axis=1).astype(jnp.float16)
    y = dense._by_dots(config, jnp.full((1, 32), 40, jnp.float16), gate_up, jnp.ones((16, 32), jnp.float16))
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, jnp.zeros_like(y))


def test_the_epsilons_are_those_of_the_configuration():
    attention = dataclasses.replace(ATTENTION, qk_norm=True, rms_norm_eps=0.5)
    block = new_block(dataclasses.replace(DENSE, attention=attention, rms_norm_eps=0.25))
    assert (block.attention.q_norm.eps, block.attention.k_norm.eps) == (0.5, 0.5)
    assert (block.attention_norm.eps, block.feed_forward_norm.eps) == (0.25, 0.25)


def test_mlp_takes_its_activation_and_limit(rng):
    network = MLP(MLPConfig(32, 16, activation="swigluoai", activation_limit=0.3, dtype=jnp.float32), rngs=nnx.Rngs(0))
    x = normal(rng, 2, 3, 32)
    gate, up = (float64(x) @ float64(network.gate_up[...])[:, i] for i in (0, 1))
    gate, up = np.minimum(gate, 0.3), np.clip(up, -0.3, 0.3)
    h = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    assert relative_error(network(x), h @ float64(network.down[...])) < LIMIT["float32"]


def test_a_dense_network_that_is_trained_takes_dots_for_few_tokens_and_kernels_for_many(rng):
    config = MLPConfig(32, 16, activation="swigluoai", activation_limit=0.3, dtype=jnp.float32)
    weights = normal(rng, 32, 2, 16), normal(rng, 16, 32)
    x = normal(rng, 70, 32)
    by_dots, by_kernels = (run(config, x, *weights) for run in (dense._by_dots, dense._as_one_expert))
    assert relative_error(by_dots, by_kernels) < LIMIT["float32"]
    dots = str(jax.make_jaxpr(functools.partial(dense._by_dots, config))(x, *weights))
    assert dots.count("dot_general") == dots.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2
    asked = ("xla", 900, 4096), ("pallas_gpu", 1, 8), ("pallas_tpu", 1, 8), ("auto", 900, 4096)
    assert [dense._takes_dots(*each) for each in asked] == [True, False, False, jax.default_backend() == "cpu"]
    with targeting(get_chip("h200")):
        assert [dense._takes_dots("auto", tokens, 32768) for tokens in (64, 65)] == [True, False]
        assert [dense._takes_dots("auto", 512, hidden) for hidden in (2048, 2049)] == [True, False]
    with targeting(get_chip("v6e")):
        assert not dense._takes_dots("auto", 1, 8)


def test_a_residual_is_what_a_network_is_added_to(rng):
    """As adding it afterwards: in its dtype, if that has more bits; what is masked comes out as zeros."""
    network = MLP(dataclasses.replace(DENSE.feed_forward, dtype=jnp.bfloat16), rngs=nnx.Rngs(0))
    x, mask = normal(rng, 1, 5, 32, dtype="bfloat16"), jnp.array([[1, 1, 0, 1, 0]], bool)
    residual = normal(rng, 1, 5, 32)
    y = network(x, residual=residual, mask=mask)
    assert y.dtype == jnp.float32
    assert not y[~mask].any()
    assert relative_error(y[mask], (network(x) + residual)[mask]) < LIMIT["float32"]
    with raises_saying(ValueError, "residual must be", "[1, 5, 32]", "[1, 4, 32]"):
        network(x, residual=residual[:, :4])


def test_a_dense_networks_kernels_make_what_its_dots_make(rng):
    """By the operators' references, with an activation that has a limit."""
    config = MLPConfig(32, 16, activation="swigluoai", activation_limit=0.3)
    x, weights = normal(rng, 70, 32, dtype="bfloat16"), (normal(rng, 32, 2, 16), normal(rng, 16, 32))
    for dtype, residual in (
        ("bfloat16", normal(rng, 70, 32, dtype="bfloat16")),
        ("float32", normal(rng, 70, 32)),
        ("float32", normal(rng, 70, 32, dtype="bfloat16")),
        ("bfloat16", None),
    ):
        y = dense._by_dense_kernels(config, jnp.dtype(dtype), x, residual, *weights)
        expected = dense._onto(dense._by_dots, config, jnp.dtype(dtype), x, residual, *weights)
        assert (y.shape, y.dtype) == ((70, 32), jnp.dtype(dtype))
        assert relative_error(y, expected) < LIMIT["bfloat16"]


def test_a_residual_is_added_in_the_dtype_of_the_result(rng):
    """Which has more bits than what is computed in, and more range."""
    network = MLP(MLPConfig(32, 16, dtype=jnp.float16), rngs=nnx.Rngs(0))
    x = normal(rng, 1, 4, 32)
    y = network(x, residual=jnp.full(x.shape, 65504, jnp.float16))
    assert y.dtype == jnp.float32
    assert relative_error(y - 65504, network(x)) < 2e-2


def test_where_a_dense_network_has_kernels():
    def names(config: MLPConfig, *, dtype=jnp.bfloat16) -> list[str]:
        x = jax.ShapeDtypeStruct((1, 512, config.hidden_size), dtype)
        network = MLP(config, rngs=nnx.Rngs(0))
        with targeting(get_chip("h200")):
            text = str(jax.make_jaxpr(lambda x: network(x, residual=x))(x))
        return [name for name in ("dense_gate_up", "dense_matmul") if f"{name}[" in text]

    both = ["dense_gate_up", "dense_matmul"]
    assert names(MLPConfig(1024, 512)) == both
    assert names(MLPConfig(1024, 512), dtype=jnp.float32) == both
    assert names(MLPConfig(1024, 512, backend="xla")) == []
    assert names(MLPConfig(1024, 512, dtype=jnp.float32)) == []
    assert names(MLPConfig(1032, 512)) == [], "y has columns that the kernel does not take"
    assert names(MLPConfig(1024, 520)) == [], "nor has h"


@pytest.mark.parametrize(
    ("tokens", "has_kernels"), [(15, False), (16, True), (128, True), (192, False), (500, True), (4096, False)]
)
def test_a_dense_network_has_kernels_for_some_tokens_where_no_gradient_is_asked_for(tokens, has_kernels):
    network = MLP(MLPConfig(1024, 512), rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, tokens, 1024), jnp.bfloat16)

    def run(x):
        return network(x, residual=x)

    def loss(x):
        return run(x).astype(jnp.float32).sum()

    with targeting(get_chip("h200")):
        served, trained = (str(jax.make_jaxpr(function)(x)) for function in (run, jax.grad(loss)))
    kernels = "dense_gate_up", "dense_matmul"
    assert [name in served for name in kernels] == [has_kernels] * 2
    assert not any(name in trained for name in kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16), (4, 64), (1, 500)], ids=str)
def test_a_dense_block_by_kernels_is_that_of_xla(shape, rng):
    """Values by `dense_matmul`, gradients by what has them."""
    by_kernels, by_xla = (
        new_block(BlockConfig(AttentionConfig(1024, 8, 8, 64, backend=backend), MLPConfig(1024, 512, backend=backend)))
        for backend in ("auto", "xla")
    )
    x = normal(rng, *shape, 1024, dtype="bfloat16")
    assert "dense_gate_up" in str(jax.make_jaxpr(by_kernels)(x))

    def loss(block, x):
        return ((block(x)[0].astype(jnp.float32) - x.astype(jnp.float32)) ** 2).sum()

    added, expected = (float64(call(block, x)[0]) - float64(x) for block in (by_kernels, by_xla))
    assert relative_error(added, expected) < 2e-2
    gradients, right = (nnx.jit(nnx.grad(loss, argnums=(0, 1)))(block, x) for block in (by_kernels, by_xla))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(right), strict=True):
        assert relative_error(one, other) < 3e-2

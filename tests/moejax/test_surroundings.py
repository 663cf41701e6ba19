"""The layer in other people's code: transformations around it, exports, checkpoints, modes of JAX."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import ROUTERS, MoE, MoEConfig, Partition, TopKRouter, dense_moe, make_mesh, moe, with_changes
from tests.helpers import mesh_of, normal, relative_error, same_bits
from tests.moejax.layers import random_params

CONFIG = MoEConfig(
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    router=TopKRouter(load_balance_loss=0.1, z_loss=0.1),
    dtype=jnp.float32,
)


@pytest.fixture
def params(rng):
    return random_params(CONFIG, rng)


def test_inside_pmap_it_is_the_layer_of_one_chip(params, rng):
    x = normal(rng, 4, 3, 32)
    y, _ = jax.pmap(lambda params, x: moe(x, params, CONFIG), in_axes=(None, 0))(params, x)
    expected = jnp.stack([moe(one, params, CONFIG)[0] for one in x])
    assert relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.slow
def test_inside_a_shard_map_over_all_axes_it_is_the_layer_of_one_chip(check_vma, params, rng):
    x = normal(rng, 4, 3, 32)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])

    def loss(params, x):
        y, aux = moe(x, params, CONFIG)
        return ((y**2).sum() + aux.loss)[None]

    each = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    value, gradients = jax.jit(jax.value_and_grad(lambda params: each(params, x).sum()))(params)
    expected, expected_gradients = jax.value_and_grad(lambda params: sum(loss(params, one)[0] for one in x[:, None]))(
        params
    )
    assert relative_error(value, expected) < 1e-6
    for got, reference in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert relative_error(got, reference) < 1e-5


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("sizes", [{"expert": 4}, {"expert": 1}, {"data": 2, "expert": 2}], ids=str)
def test_gradients_are_summed_over_stages_as_their_parameters_are(sizes, check_vma, params, rng):
    """In float32, whatever the layer casts its parameters to."""
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    x = normal(rng, 2, 4, 32, dtype="bfloat16")
    with jax.set_mesh(mesh_of(stage=2, **sizes)):
        over = {"in_specs": (P(), P("stage")), "out_specs": P("stage"), "axis_names": {"stage"}}
        each = jax.shard_map(lambda params, x: moe(x, params, config)[0], **over, check_vma=check_vma)
        program = str(jax.make_jaxpr(jax.grad(lambda params: each(params, x).astype("float32").sum()))(params))
    sums = re.findall(r":(\w+)\[\S* = psum", program)
    assert "f32" in sums
    assert "bf16" not in sums


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.slow
def test_pipeline_stages(axis_type, check_vma, rng):
    """Each stage is a layer of its own over the expert axis that is left; gradients are those without a pipeline."""
    stages = [random_params(CONFIG, rng) for _ in range(2)]
    x = normal(rng, 2, 8, 32)

    def loss(params, x, partition=None):
        y, aux = moe(x, params, CONFIG, partition=partition)
        return (y**2).sum() + aux.loss

    expected = [jax.value_and_grad(loss)(params, one) for params, one in zip(stages, x, strict=True)]
    partition = Partition(repeated="stage")  # which a layer that is made under this mesh needs
    mesh = jax.make_mesh((2, 4), ("stage", "expert"), (axis_type,) * 2, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        stacked = jax.device_put(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *stages), NamedSharding(mesh, P("stage"))
        )
        placed = jax.device_put(x, NamedSharding(mesh, P("stage")))
        each = jax.shard_map(
            lambda params, x: loss(jax.tree.map(lambda leaf: leaf[0], params), x[0], partition)[None],
            in_specs=(P("stage"), P("stage")),
            out_specs=P("stage"),
            axis_names={"stage"},
            check_vma=check_vma,
        )
        value, gradients = jax.jit(jax.value_and_grad(lambda params: each(params, placed).sum()))(stacked)
    assert relative_error(value, sum(one for one, _ in expected)) < 1e-5
    for number, (_, reference) in enumerate(expected):
        for got, own in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
            assert relative_error(np.asarray(got)[number], own) < 1e-5


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.slow
def test_stacked_layers_are_scanned(ep, rng):
    x = normal(rng, 2, 8, 32)
    mesh = make_mesh(ep, devices=jax.devices()[:ep])

    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make(key):
        return MoE(CONFIG, rngs=nnx.Rngs(key))

    @nnx.jit
    def run(layers, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: None})
        def through(x, layer):
            y, _ = layer(x)
            return x + y

        return through(x, layers)

    keys = jax.random.split(jax.random.key(0), 3)
    with jax.set_mesh(mesh):
        layers = make(keys)
        assert layers.gate_up[...].shape == (3, 8, 32, 2, 16)
        y = run(layers, x)
    expected = x
    for key in keys:
        expected = expected + MoE(CONFIG, rngs=nnx.Rngs(key))(expected)[0]
    assert relative_error(y, expected) < 1e-5


def test_eager_calls_compile_once(rng):
    layer = MoE(CONFIG, rngs=nnx.Rngs(0))
    x = normal(rng, 2, 6, 32)
    jax.block_until_ready(layer(x))
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(3):
            jax.block_until_ready(layer(x))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


@pytest.mark.parametrize(
    "sizes", [{"expert": 8}, {"fsdp": 4, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=" ".join
)
@pytest.mark.quick("fsdp expert tensor")
def test_a_checkpoint_is_restored_on_another_mesh(sizes, tmp_path, rng):
    config = with_changes(CONFIG, scoring="sigmoid", correction_bias=True)
    x = normal(rng, 2, 8, 32)
    call = nnx.jit(lambda layer, x: layer(x))
    with jax.set_mesh(make_mesh(ep=4, dp=2)):
        layer = MoE.from_params(random_params(config, rng), config)
    _, aux = call(layer, x)
    layer.update(aux)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=jax.devices()[:8])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(layer))
        checkpointer.wait_until_finished()
        resumed = MoE(config, rngs=nnx.Rngs(1), mesh=mesh)
        nnx.update(resumed, checkpointer.restore(tmp_path / "layer", nnx.state(resumed)))
    assert same_bits(resumed.params(), layer.params())
    assert resumed.router.correction_bias[...].sharding.mesh.shape == mesh.shape
    assert relative_error(call(resumed, x)[0], call(layer, x)[0]) < 1e-6


@pytest.mark.slow
def test_arrays_that_are_committed_to_one_device_are_spread(params, rng):
    x = normal(rng, 2, 8, 32)
    expected, _ = moe(x, params, CONFIG)
    committed = jax.device_put((x, params), jax.devices()[3])
    y, _ = moe(*committed, CONFIG, mesh=make_mesh(ep=4))
    assert relative_error(y, expected) < 1e-6


@pytest.mark.slow
def test_a_layer_of_another_mesh_is_moved(rng):
    x = normal(rng, 4, 8, 32)
    with jax.set_mesh(make_mesh(4)):
        layer = MoE(CONFIG, rngs=nnx.Rngs(0))
        expected, _ = layer(x)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "expert"), (AxisType.Auto,) * 3, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        y, _ = layer(x)
    assert relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda", "tpu"]])
@pytest.mark.filterwarnings("ignore:.*kernels need sizes that are numbers")
def test_an_export_for_any_number_of_tokens(params, rng, platforms):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    layer = jax.jit(lambda params, x: moe(x, params, CONFIG)[0])
    tokens = jax.ShapeDtypeStruct(export.symbolic_shape("b, n, 32"), jnp.float32)
    exported = export.export(layer, platforms=platforms)(shapes, tokens)
    for shape in ((1, 1), (3, 40)):
        x = normal(rng, *shape, 32)
        assert relative_error(exported.call(params, x), layer(params, x)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*falling back to the XLA reference")
def test_an_export_for_several_platforms_runs_on_each(params, rng):
    """XLA's compiler for CPUs aborts on running sums as they are for several platforms."""
    config = dataclasses.replace(CONFIG, capacity_factor=0.75)
    layer = jax.jit(lambda params, x, ids: moe(x, params, config, topk_ids=ids)[0])
    x, ids = normal(rng, 40, 32), jnp.full((40, CONFIG.top_k), -1, jnp.int32).at[3, 0].set(2)
    exported = export.export(layer, platforms=["cpu", "cuda", "tpu"])(params, x, ids)
    assert relative_error(exported.call(params, x, ids), layer(params, x, ids)) < 1e-6


@pytest.mark.parametrize("scope", ["batch", "chip"])
def test_an_export_for_any_number_of_tokens_drops_what_exceeds_a_capacity(params, rng, scope):
    config = dataclasses.replace(CONFIG, capacity_factor=0.75, capacity_of=scope)
    layer = jax.jit(lambda params, x: moe(x, params, config)[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    tokens = jax.ShapeDtypeStruct(export.symbolic_shape("n, 32"), jnp.float32)
    exported = export.export(layer, platforms=["cpu"])(shapes, tokens)
    for number in (1, 40):
        x = normal(rng, number, 32)
        assert relative_error(exported.call(params, x), layer(params, x)) < 1e-6


def test_an_export_for_a_tpu_has_its_kernels():
    config = MoEConfig(256, 128, 8, 2)
    shapes = jax.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)).params())
    layer = jax.jit(lambda params, x: moe(x, params, config)[0])
    exported = export.export(layer, platforms=["tpu"])(shapes, jax.ShapeDtypeStruct((16, 256), jnp.bfloat16))
    assert "tpu_custom_call" in exported.mlir_module()


def test_an_export_of_exactly_the_rows_there_are_takes_a_permission():
    config = MoEConfig(256, 128, 8, 2, transport="ragged")
    shapes = jax.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)).params())
    layer = jax.jit(lambda params, x: moe(x, params, config, mesh=make_mesh(4))[0])
    permission = export.DisabledSafetyCheck.custom_call("ragged_all_to_all")
    exported = export.export(layer, platforms=["tpu"], disabled_checks=[permission])
    assert "ragged_all_to_all" in exported(shapes, jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)).mlir_module()


@pytest.mark.slow
def test_hessian_times_a_vector(params, rng):
    x, direction = normal(rng, 6, 32), normal(rng, 6, 32)

    def product(function):
        def directional(x):
            return (jax.grad(lambda x: (function(x) ** 2).sum())(x) * direction).sum()

        return jax.grad(directional)(x)

    expected = product(lambda x: dense_moe(x, params, CONFIG))
    assert relative_error(product(lambda x: moe(x, params, CONFIG)[0]), expected) < 1e-4
    forward = jax.jvp(jax.grad(lambda x: (moe(x, params, CONFIG)[0] ** 2).sum()), (x,), (direction,))[1]
    assert relative_error(forward, expected) < 1e-4


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.quick("expert_choice")
def test_modes_of_jax(name, rng):
    """Wider types, no promotion, and a look for infinities change nothing of what comes back."""
    layer = MoE(ROUTERS[name](CONFIG), rngs=nnx.Rngs(params=0, router=1))
    x = normal(rng, 2, 6, 32)
    ids = jnp.asarray(rng.integers(0, 100, (2, 6)), jnp.int32)
    call = functools.partial(layer, x, token_ids=ids, train=False)
    y, aux = call()
    modes = (jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_infs(True), jax.debug_nans(True))
    for mode in modes:
        with mode:
            z, other = call()
        assert jax.tree.map(lambda leaf: leaf.dtype, other) == jax.tree.map(lambda leaf: leaf.dtype, aux)
        assert relative_error(z, y) < 1e-6


@pytest.mark.parametrize("transport", ["auto", "ragged"])
def test_choices_that_are_repeated_promote_nothing(transport, params, rng):
    config = dataclasses.replace(CONFIG, transport=transport)
    ids = jnp.asarray(rng.integers(-1, 8, (4, 2)), jnp.int32)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda x: moe(x, params, config, topk_ids=ids, mesh=make_mesh(4)), normal(rng, 4, 32))


@pytest.mark.parametrize("dtype", ["int32", "float8_e4m3fn"])
def test_weights_of_other_types_are_refused(dtype, params, rng):
    wrong = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with pytest.raises(ValueError, match=f"params.gate_up must be BF16, FP16 or float32, or a QTensor.*{dtype}"):
        moe(normal(rng, 4, 32), wrong, CONFIG)


def test_tables_of_modules():
    """`nnx.tabulate` shows the layer, and a model that gives out what its layers say."""

    class Model(nnx.Module):
        def __init__(self):
            self.layer = MoE(CONFIG, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y, aux = self.layer(x)
            return y, [aux]

    text = nnx.tabulate(Model(), jnp.ones((2, 4, 32)), console_kwargs={"width": 200})
    experts, router = 8 * 3 * 32 * 16, 32 * 8
    for shown in ("load_balance", "tokens_per_expert", "topk_ids", f"Total Parameters: {experts + router:,}"):
        assert shown in text.replace("\x1b[0m", ""), shown


def test_what_a_layer_says_is_a_tree_and_a_dict(params, rng):
    _, aux = moe(normal(rng, 4, 32), params, CONFIG)
    assert same_bits(jax.tree.map(jnp.asarray, aux), aux)
    assert list(aux) == ["losses", "load", "topk_ids", "topk_weights"]
    assert aux["topk_ids"] is aux.topk_ids
    assert "load.dropped_per_expert" in jax.tree_util.keystr(
        jax.tree_util.tree_flatten_with_path(aux)[0][3][0], simple=True, separator="."
    )

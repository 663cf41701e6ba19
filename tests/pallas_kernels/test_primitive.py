"""Where an operator runs, when that is decided, and what is kept of it."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.extend import core
from jax.sharding import PartitionSpec

from pallas_kernels import backend as backends
from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import Quantization
from pallas_kernels.top_k import top_k
from pallas_kernels.tracing.override import Override, overrides
from pallas_kernels.tracing.target import targeting
from sharding.mesh import EXPERT_AXIS, make_mesh
from tests.helpers import normal, raises_saying, relative_error

GROUPS, TOKENS, TOP_K, HIDDEN, WIDTH = 8, 64, 2, 256, 128


def layer(x, scores, w1, w2):
    """Every operator once."""
    weights, ids = top_k(scores, TOP_K)
    plan = make_plan(ids, GROUPS)
    rows = grouped_gate_up(dispatch(x, plan), w1, plan.group_sizes)
    return combine(grouped_matmul(rows, w2, plan.group_sizes), plan, weights)


def shapes(*, sharding=None):
    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    w1, w2 = array(GROUPS, HIDDEN, 2 * WIDTH), array(GROUPS, WIDTH, HIDDEN)
    return array(TOKENS, HIDDEN), array(TOKENS, GROUPS, dtype="float32"), w1, w2


def random_arrays(rng):
    return tuple(normal(rng, *x.shape, dtype=x.dtype) for x in shapes())


def sharded(x, scores, w1, w2):
    split, whole = PartitionSpec(EXPERT_AXIS), PartitionSpec()
    run = jax.shard_map(layer, mesh=make_mesh(2), in_specs=(split, split, whole, whole), out_specs=split)
    return run(x, scores, w1, w2)


def trained(*operands):
    return jax.grad(lambda *operands: layer(*operands).astype(jnp.float32).sum(), (0, 1, 2, 3))(*operands)


@pytest.mark.parametrize("function", [layer, trained, sharded])
@pytest.mark.quick("sharded", "trained")
def test_exported_for_a_tpu_from_another_machine(function):
    text = export.export(jax.jit(function), platforms=["tpu"])(*shapes()).mlir_module()
    for kernel in ("dispatch", "grouped_matmul", "combine", *(["grouped_gate_up"] if function is not trained else [])):
        assert f'kernel_name = "{kernel}"' in text
    assert "tpu_custom_call" in text


def test_exported_for_a_gpu_from_another_machine():
    text = export.export(jax.jit(layer), platforms=["cuda"])(*shapes()).mlir_module()
    assert "mosaic_gpu" in text
    assert all(
        kernel in text for kernel in ("counting_sort", "dispatch", "grouped_gate_up", "grouped_matmul", "combine")
    )


def test_exported_for_several_platforms_at_once(rng):
    exported = export.export(jax.jit(layer), platforms=["cpu", "tpu"])(*shapes())
    assert "tpu_custom_call" in exported.mlir_module()
    operands = random_arrays(rng)
    assert relative_error(exported.call(*operands), layer(*operands)) < 1e-6


def test_arrays_on_a_cpu_beside_a_gpu(rng, monkeypatch):
    """Where they lie says where a program runs, not what jax would rather use."""
    operands = random_arrays(rng)
    expected = jax.jit(layer)(*operands)
    jax.clear_caches()
    for name in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        assert relative_error(jax.jit(layer)(*operands), expected) == 0
        assert relative_error(layer(*operands), expected) < 1e-2


def test_what_kernels_refuse_is_the_references_and_said_once():
    backends._say_once.cache_clear()
    x, plan = jax.ShapeDtypeStruct((8, 33), jnp.float32), make_plan(jnp.zeros((8, 1), jnp.int32), 1)
    program = jax.jit(lambda x: dispatch(x, plan))
    with pytest.warns(UserWarning, match="dispatch: falling back to the XLA reference"):
        assert "mosaic_gpu" not in export.export(program, platforms=["cuda"])(x).mlir_module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export.export(program, platforms=["cuda"])(x)


def test_what_a_named_backend_refuses_is_an_error_while_tracing():
    x, plan = jax.ShapeDtypeStruct((8, 33), jnp.float32), make_plan(jnp.zeros((8, 1), jnp.int32), 1)
    with raises_saying(Unsupported, "rows of at least 128 elements"):
        jax.eval_shape(lambda x: dispatch(x, plan, backend="pallas_gpu"), x)
    backends._say_once.cache_clear()
    with targeting(get_chip("h200")), pytest.warns(UserWarning, match="rows of at least 128 elements"):
        jax.eval_shape(lambda x: dispatch(x, plan), x)


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_kernels_for_another_platform_say_so(rng, backend):
    x = normal(rng, 8, 128)
    plan = make_plan(jnp.zeros((8, 1), jnp.int32), 1)
    program = jax.jit(functools.partial(dispatch, backend=backend))
    with raises_saying(ValueError, f"backend '{backend}' has no kernels for a platform", "(cpu)", "'auto'"):
        program(x, plan)
    other = "tpu" if backend == "pallas_gpu" else "cuda"
    with raises_saying(ValueError, f"backend '{backend}' has no kernels for a platform", f"(cpu, {other})"):
        export.export(program, platforms=["cpu", other])(x, plan)


def test_a_call_with_arrays_is_compiled_once(rng):
    operands = random_arrays(rng)
    compiled = []

    def listen(event, duration, **_):
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    run = functools.partial(grouped_matmul, operands[0], operands[2], jnp.full(GROUPS, TOKENS // GROUPS, jnp.int32))
    run(), layer(*operands), trained(*operands)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            run(), layer(*operands), trained(*operands)
        assert not compiled
        layer(*(x.astype(jnp.float32) for x in operands))
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def products(function, *operands) -> list[str]:
    """The operators that a program calls, by name."""
    names = {"grouped_matmul", "grouped_matmul_drhs", "grouped_gate_up", "combine_dweights"}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in names:
                yield equation.primitive.name
            else:
                for inner in core.jaxprs_in_params(equation.params):
                    yield from walk(inner)

    return sorted(walk(jax.make_jaxpr(function)(*operands).jaxpr))


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["", "8 bits"])
def test_reverse_mode_multiplies_what_it_has_to(rng, quantization):
    x, _, w1, _ = random_arrays(rng)
    sizes = jnp.full(GROUPS, TOKENS // GROUPS, jnp.int32)

    def of(function, numbers):
        def total(x, w):
            return function(x, w, sizes, quantization=quantization).astype(jnp.float32).sum()

        return products(jax.grad(total, numbers), x, w1)

    both = ["grouped_matmul", "grouped_matmul", "grouped_matmul_drhs"]
    for function in (grouped_matmul, grouped_gate_up):
        assert of(function, (0, 1)) == both
        assert of(function, 0) == ["grouped_matmul", "grouped_matmul"]  # frozen weights cost nothing
        assert of(function, 1) == ["grouped_matmul", "grouped_matmul_drhs"]


def test_reverse_mode_keeps_operands_and_preactivations(rng):
    x, _, w1, _ = random_arrays(rng)
    sizes = jnp.full(GROUPS, TOKENS // GROUPS, jnp.int32)
    _, pullback = jax.vjp(lambda x, w: grouped_gate_up(x, w, sizes), x, w1)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.size > GROUPS)
    assert kept == sorted([x.shape, w1.shape, (TOKENS, 2 * WIDTH)])


def test_compiled_programs_do_not_hold_what_was_rounded(rng):
    """Faces only carry derivatives of higher order: a loop that has none keeps rows in 8 bits."""
    layers, rows, width = 3, 48, 128
    weights, sizes = normal(rng, layers, 2, width, width, dtype=jnp.bfloat16), jnp.full(2, rows // 2, jnp.int32)

    def total(x, weights):
        def one(x, w):
            return grouped_matmul(2 * x, w, sizes, quantization=Quantization()), None

        return jax.lax.scan(one, x, weights)[0].astype(jnp.float32).sum()

    x = normal(rng, rows, width, dtype=jnp.bfloat16)
    text = jax.jit(jax.grad(total, (0, 1))).lower(x, weights).compile().as_text()
    stacked = f"[{layers},{rows},{width}]"
    assert f"f8e4m3fn{stacked}" in text
    assert f"bf16{stacked}" not in text
    assert f"f32{stacked}" not in text


def test_overrides_are_given_again():
    first, second = Override[int]("first"), Override[list]("second")
    with first(1), second([2]):
        kept = overrides()
        assert kept == overrides()
        assert hash(kept) == hash(overrides())
        with first(3):
            assert kept != overrides()
    with first(4), kept.again():
        assert (first.get(), second.get()) == (1, [2])
    with first(4), overrides().again():
        assert (first.get(), second.get()) == (4, None)
    assert first.get() is None

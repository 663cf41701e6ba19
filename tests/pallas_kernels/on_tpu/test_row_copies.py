"""What only the TPU kernels of dispatch and combine can get wrong: words, blocks, cores, both ways to reach a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.chips import get_chip
from pallas_kernels.combine import reference as combine_reference
from pallas_kernels.combine import tpu as combine_tpu
from pallas_kernels.dispatch import reference as dispatch_reference
from pallas_kernels.dispatch import tpu as dispatch_tpu
from pallas_kernels.on_tpu.row_copies import RESIDENT_SHARE, Rows, Steps, from_words, to_words
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, normal, raises_saying, relative_error
from tests.pallas_kernels.kernels_tpu import interpreted
from tests.pallas_kernels.plan.plans import planned


def some_plan(rng, capacity=None):
    return planned(jnp.asarray(rng.integers(-1, 6, (37, 3)), jnp.int32), 5, capacity=capacity)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_words_are_what_kernels_see_of_a_reference(rng, dtype):
    def body(x, out):
        out[...] = x.bitcast(jnp.uint32)[...]

    x = (10 * normal(rng, 64, 256)).astype(dtype)
    words = to_words(x)
    seen = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(words.shape, jnp.uint32), interpret=True)(x)
    np.testing.assert_array_equal(seen, words)
    np.testing.assert_array_equal(from_words(words, dtype), x)


@pytest.mark.parametrize("cores", ["v6e", "v5p"])
@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.quick("float8_e4m3fn-False-v5p")
def test_dispatch_in_small_steps(rng, dtype, is_resident, cores):
    x, plan = (10 * normal(rng, 37, 256)).astype(dtype), some_plan(rng, capacity=23)
    config = dispatch_tpu.Config(block_rows=32, is_resident=is_resident)
    rows = run_with_cores_of(cores, lambda x, plan: dispatch_tpu.dispatch_rows(x, plan, config), x, plan)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(dispatch_reference.dispatch(x, plan)))


@pytest.mark.parametrize("cores", ["v6e", "v5p"])
@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.quick("float32-True-v5p")
def test_combine_in_small_steps(rng, dtype, is_resident, cores):
    plan = some_plan(rng)
    rows = jnp.where((plan.order < 0)[:, None], jnp.nan, normal(rng, plan.order.shape[0], 256, dtype=dtype))
    weights, dout = normal(rng, 37, 3), normal(rng, 37, 256)
    config = combine_tpu.Config(block_tokens=16, is_resident=is_resident)
    y, dweights = run_with_cores_of(
        cores,
        lambda rows, plan, weights, dout: (
            combine_tpu.combine(rows, plan, weights, out_dtype=jnp.float32, config=config),
            combine_tpu.combine_dweights(rows, plan, dout, config),
        ),
        rows,
        plan,
        weights,
        dout,
    )
    expected = combine_reference.combine(rows, plan, weights, out_dtype=jnp.float32)
    assert relative_error(y, expected) < LIMIT["float32"]
    assert relative_error(dweights, combine_reference.combine_dweights(rows, plan, dout)) < LIMIT["float32"]


def run_with_cores_of(chip, function, *args):
    """Runs in interpret mode with the cores that `chip` has, each with its share of the steps."""
    with pytest.MonkeyPatch.context() as patch, interpreted(num_cores_or_threads=get_chip(chip).cores):
        for module in (dispatch_tpu, combine_tpu):
            patch.setattr(module, "tpu_chip", lambda: get_chip(chip))
        return jax.jit(function)(*args)


def test_dma_and_comp_leave_out_what_they_say(rng):
    x, plan = normal(rng, 37, 256), some_plan(rng)
    lowered = {
        stage: str(lower(lambda x, stage=stage: dispatch_tpu.dispatch_rows(x, plan, stage=stage), x))
        for stage in ("full", "comp", "dma")
    }
    assert "dma_start" in lowered["full"]
    assert "dma_start" not in lowered["comp"]
    assert "shift_left" not in lowered["dma"]


def lower(function, *args):
    with targeting(get_chip("v6e")):
        return jax.jit(function).trace(*args).jaxpr


def test_rows_of_a_large_matrix_stay_in_main_memory():
    chip = get_chip("v6e")
    most = int(RESIDENT_SHARE * chip.fast_memory_bytes) // 512
    assert Rows.of("dispatch", jax.ShapeDtypeStruct((most, 256), jnp.bfloat16), chip).is_resident
    assert not Rows.of("dispatch", jax.ShapeDtypeStruct((most + 1, 256), jnp.bfloat16), chip).is_resident


@pytest.mark.parametrize(("blocks", "cores"), [(1, 1), (7, 2), (1, 2), (8, 4), (5, 4)])
def test_every_block_is_made_once_after_its_rows_were_asked_for(blocks, cores):
    steps = Steps.of(blocks, cores)
    made = []
    assert steps.cores <= cores
    for core in range(steps.cores):
        asked = [int(steps.ahead(core, step)) for step in range(steps.each + 1)]
        for step in range(1, steps.each + 1):
            assert int(steps.now(core, step)) == asked[step - 1]
            made.append(asked[step - 1])
    assert sorted(made) == list(range(steps.cores * steps.each))
    assert all(int(steps.result(core, 1)) == steps.now(core, 1) < blocks for core in range(steps.cores))
    assert steps.grid == (steps.cores, steps.each + 1)


def test_what_is_refused():
    plan = planned(jnp.zeros((3, 1), int), 1)
    with raises_saying(NotImplementedError, "combine", "BF16 and float32", "float16"):
        combine_tpu.combine(jnp.ones((3, 128), jnp.float16), plan, jnp.ones((3, 1)), out_dtype=jnp.float32)
    with raises_saying(NotImplementedError, "dispatch", "1, 2 or 4 bytes", "complex64"):
        dispatch_tpu.dispatch(jnp.ones((3, 128), jnp.complex64), plan)

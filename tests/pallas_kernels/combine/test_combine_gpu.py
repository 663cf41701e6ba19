"""The GPU kernels where there is no GPU: interpreted on the CPU against the reference, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.combine import reference
from pallas_kernels.combine.gpu import Config, combine, combine_dweights, combine_onto
from tests.helpers import LIMIT, normal, raises_saying, relative_error
from tests.pallas_kernels.kernels_gpu import abstract_plan, interpreted, lower_for_cuda
from tests.pallas_kernels.plan.plans import planned

SMALL = Config(blocks=3, vectors=1)


def problem(rng, columns, dtype, capacity):
    """rows, plan, weights; rows without an assignment and weights of missing rows are NaN."""
    ids = jnp.asarray(rng.integers(-1, 6, (9, 3)), jnp.int32)
    plan = planned(ids, 5, capacity=capacity)
    rows = jnp.where((plan.order < 0)[:, None], jnp.nan, normal(rng, plan.order.shape[0], columns, dtype=dtype))
    weights = jnp.where(plan.inverse < 0, jnp.nan, jnp.asarray(rng.uniform(0, 1, ids.shape), jnp.float32))
    return rows, plan, weights


@pytest.mark.parametrize(("dtype", "out_dtype"), [("float32",) * 2, ("bfloat16", "float32"), ("float16", "float16")])
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.quick("None-float32-float32", "4-bfloat16-float32")
def test_interpreted(rng, capacity, dtype, out_dtype):
    rows, plan, weights = problem(rng, 512, dtype, capacity)
    with interpreted():
        out = combine(rows, plan, weights, out_dtype=out_dtype, config=SMALL)
    assert out.dtype == out_dtype
    assert relative_error(out, reference.combine(rows, plan, weights, out_dtype=out_dtype)) < LIMIT[out_dtype]


@pytest.mark.parametrize("of_residual", ["bfloat16", "float32"])
def test_onto_a_residual_interpreted(rng, of_residual):
    rows, plan, weights = problem(rng, 512, "bfloat16", 4)
    residual = normal(rng, 9, 512, dtype=of_residual)
    with interpreted():
        out = combine_onto(rows, plan, weights, residual, out_dtype=jnp.bfloat16)
    right = reference.combine_onto(rows, plan, weights, residual, out_dtype=jnp.float32)
    assert relative_error(out, right) < LIMIT["bfloat16"]


def test_a_residual_of_several_strips(rng):
    rows, plan, weights = problem(rng, 1160, "bfloat16", 4)
    residual = normal(rng, 9, 1160)
    with interpreted(detect_races=False):  # what two strips share is written twice
        out = combine_onto(rows, plan, weights, residual, out_dtype=jnp.float32)
    right = reference.combine_onto(rows, plan, weights, residual, out_dtype=jnp.float32)
    assert relative_error(out, right) < LIMIT["float32"]


def test_strips_that_overlap(rng):
    rows, plan, weights = problem(rng, 1160, "bfloat16", 4)
    with interpreted(detect_races=False):  # what two strips share is written twice
        out = combine(rows, plan, weights, out_dtype="bfloat16", config=SMALL)
    assert relative_error(out, reference.combine(rows, plan, weights, out_dtype="bfloat16")) < LIMIT["bfloat16"]


@pytest.mark.parametrize("columns", [512, 1160])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.quick("bfloat16-1160", "float32-512")
def test_gradient_of_the_weights_interpreted(rng, dtype, columns):
    rows, plan, _ = problem(rng, columns, dtype, 4)
    dout = normal(rng, 9, columns, dtype=dtype)
    with interpreted():
        dweights = combine_dweights(rows, plan, dout)
    assert relative_error(dweights, reference.combine_dweights(rows, plan, dout)) < LIMIT["float32"]
    assert not np.asarray(dweights)[np.asarray(plan.inverse) < 0].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "out_dtype"),
    [
        ((16384, 2, 4096), "bfloat16", "bfloat16"),
        ((64, 8, 2048), "float16", "float32"),
        ((5, 1, 128), "float32", "bfloat16"),
        ((100, 4, 2880), "bfloat16", "bfloat16"),
        ((1_000_000, 16, 7168), "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_lowers_for_cuda(shape, dtype, out_dtype):
    num_tokens, top_k, columns = shape
    plan = abstract_plan(num_tokens, top_k)
    rows = jax.ShapeDtypeStruct((num_tokens * top_k, columns), dtype)
    weights = jax.ShapeDtypeStruct((num_tokens, top_k), "float32")
    dout = jax.ShapeDtypeStruct((num_tokens, columns), out_dtype)
    lower_for_cuda(functools.partial(combine, out_dtype=out_dtype), rows, plan, weights)
    lower_for_cuda(combine_dweights, rows, plan, dout)


def test_short_rows_are_refused():
    with raises_saying(NotImplementedError, "combine", "at least 128 elements", "19 of float32"):
        combine(jnp.zeros((3, 19)), planned(jnp.zeros((3, 1), int), 1), jnp.ones((3, 1)), out_dtype="float32")

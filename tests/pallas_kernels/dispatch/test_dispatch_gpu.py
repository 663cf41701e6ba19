"""The GPU kernel where there is no GPU: interpreted on the CPU against the reference, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import reference
from pallas_kernels.dispatch.gpu import (
    Config,
    copies,
    dispatch,
    dispatch_rounded,
    dispatch_rows,
    dispatch_weighted,
    plan_and_dispatch,
)
from pallas_kernels.quantize import QTensor
from tests.helpers import normal, raises_saying
from tests.pallas_kernels.kernels_gpu import abstract_plan, interpreted, lower_for_cuda
from tests.pallas_kernels.plan.plans import planned

SMALL = Config(blocks=3, zero_blocks=2, vectors=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.quick("4-int8", "None-bfloat16")
def test_interpreted(rng, capacity, dtype):
    ids = jnp.asarray(rng.integers(-1, 6, (9, 3)), jnp.int32)
    plan = planned(ids, 5, capacity=capacity)
    x = (10 * normal(rng, 9, 512)).astype(dtype)
    with interpreted():
        rows = dispatch_rows(x, plan, config=SMALL)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(reference.dispatch(x, plan)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.quick("4-bfloat16", "None-float32")
def test_weighted_interpreted(rng, capacity, dtype):
    ids = jnp.asarray(rng.integers(-1, 6, (9, 3)), jnp.int32)
    plan, weights = planned(ids, 5, capacity=capacity), normal(rng, 9, 3)
    x = normal(rng, 9, 512, dtype=dtype)
    with interpreted():
        rows = dispatch_rows(x, plan, weights, config=SMALL)
    expected = reference.dispatch_weighted(x, plan, weights, out_dtype=x.dtype)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(expected))


@pytest.mark.parametrize("columns", [1160, 1030])
@pytest.mark.quick("1160")
def test_strips_that_overlap(rng, columns):
    plan = planned(jnp.asarray(rng.integers(-1, 3, (3, 2)), jnp.int32), 2, capacity=3)
    x = normal(rng, 3, columns, dtype=jnp.bfloat16)
    with interpreted(detect_races=False):  # what two strips share is written twice
        rows = dispatch_rows(x, plan, config=SMALL)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(reference.dispatch(x, plan)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((16384, 2, 4096), "bfloat16"),
        ((64, 8, 2048), "float16"),
        ((5, 1, 128), "float32"),
        ((100, 4, 2880), "bfloat16"),
        ((64, 8, 7168), "float8_e4m3fn"),
        ((8, 16, 7168), "float8_e5m2"),
        ((1_000_000, 8, 7168), "int8"),
    ],
    ids=str,
)
@pytest.mark.quick("(64, 8, 7168)-float8_e4m3fn", "(16384, 2, 4096)-bfloat16")
def test_lowers_for_cuda(shape, dtype):
    num_tokens, top_k, columns = shape
    x = jax.ShapeDtypeStruct((num_tokens, columns), dtype)
    plan = abstract_plan(num_tokens, top_k)
    lower_for_cuda(dispatch, x, plan)
    if x.dtype.itemsize > 1:
        weights = jax.ShapeDtypeStruct((num_tokens, top_k), "float32")
        lower_for_cuda(lambda *args: dispatch_weighted(*args, out_dtype=x.dtype), x, plan, weights)


@pytest.mark.parametrize("scales", [56, 1])
def test_scales_travel_with_their_rows(scales):
    values, scale = jax.ShapeDtypeStruct((64, 7168), "float8_e4m3fn"), jax.ShapeDtypeStruct((64, scales), "float32")
    rows = jax.eval_shape(dispatch, QTensor(values, scale), abstract_plan(64, 8))
    assert (rows.values.shape, rows.scale.shape) == ((512, 7168), (512, scales))


def test_scales_of_many_rows_are_gathered_row_by_row(rng):
    """In memory too, however they are wanted after that."""
    tokens, scales = 4096, normal(rng, 4096, 4)
    plan = planned(jnp.asarray(rng.integers(-1, 9, (tokens, 3)), jnp.int32), 8)
    gathered = jax.jit(lambda scales, plan: copies._scales(scales, plan))
    np.testing.assert_array_equal(gathered(scales, plan), reference.dispatch(scales, plan))
    constraint = [line for line in gathered.lower(scales, plan).as_text().splitlines() if "LayoutConstraint" in line]
    assert len(constraint) == 1
    assert "result_layouts = [dense<[1, 0]> : tensor<2xindex>]" in constraint[0]
    few = abstract_plan(64, 8)
    assert "LayoutConstraint" not in gathered.lower(scales[:64], few).as_text()


@pytest.mark.parametrize(
    ("columns", "of", "dtype"),
    [(1024, "bfloat16", "float8_e4m3fn"), (2048, "float32", "float8_e5m2"), (1536, "float16", "float8_e4m3fn")],
    ids=str,
)
@pytest.mark.quick("2048-*")
def test_rounded_interpreted(rng, monkeypatch, columns, of, dtype):
    """NaN in a token stays in its blocks; rows without an assignment are zeros, and so are their scales."""
    monkeypatch.setattr("pallas_kernels.dispatch.gpu.rounded._most_programs", lambda chip: 3)
    plan = planned(jnp.asarray(rng.integers(-1, 4, (5, 2)), jnp.int32), 3, capacity=4)
    x = normal(rng, 5, columns, dtype=of).at[3, 130].set(jnp.nan)
    overlap = columns % 1024 != 0  # then what two strips share is written twice
    with interpreted(detect_races=not overlap):
        rows = dispatch_rounded(x, plan, dtype=jnp.dtype(dtype))
    expected = reference.dispatch_rounded(x, plan, dtype=jnp.dtype(dtype))
    np.testing.assert_array_equal(rows.values.astype("float32"), expected.values.astype("float32"))
    np.testing.assert_array_equal(rows.scale, expected.scale)


@pytest.mark.parametrize(
    ("num_tokens", "columns"), [(64, 2048), (16, 7168), (9, 1536), (32768, 2048), (64, 512)], ids=str
)
@pytest.mark.quick("64-2048", "64-512")
def test_rounded_lowers_for_cuda(num_tokens, columns):
    """Few rows, many, and rows too short for a kernel that does both."""
    x = jax.ShapeDtypeStruct((num_tokens, columns), "bfloat16")
    lower_for_cuda(
        lambda *args: dispatch_rounded(*args, dtype=jnp.dtype("float8_e4m3fn")), x, abstract_plan(num_tokens, 8)
    )


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_groups", "columns", "of", "dtype"),
    [
        (5, 3, 4, 1024, "float32", "float8_e4m3fn"),
        (1, 1, 1, 2048, "bfloat16", "float8_e4m3fn"),
        (33, 2, 70, 1536, "float16", "float8_e5m2"),  # two tiles of keys, and of groups
        (10, 7, 3, 1024, "bfloat16", "float8_e4m3fn"),  # the choices of a token lie in both
    ],
    ids=str,
)
@pytest.mark.quick("1-1-1-*", "10-*")
def test_planned_interpreted(rng, num_tokens, top_k, num_groups, columns, of, dtype):
    """As one after the other: rows of no group, and numbers that no expert has; NaN stays in its block."""
    ids = jnp.asarray(rng.integers(-1, num_groups + 1, (num_tokens, top_k)), jnp.int32).at[1:2, 0].set(2**31 - 1)
    x = normal(rng, num_tokens, columns, dtype=of).at[num_tokens // 2, 130].set(jnp.nan)
    of_all = {"num_groups": num_groups, "dtype": jnp.dtype(dtype)}
    with interpreted(detect_races=columns % 1024 == 0):  # else what two strips share is written twice
        by_group, rows = plan_and_dispatch(x, ids, **of_all)
    right_by_group, right = reference.plan_and_dispatch(x, ids, **of_all)
    jax.tree.map(np.testing.assert_array_equal, by_group, right_by_group)
    np.testing.assert_array_equal(rows.values.astype("float32"), right.values.astype("float32"))
    np.testing.assert_array_equal(rows.scale, right.scale)


@pytest.mark.parametrize("choice", [0, 1, -1], ids=["all on one", "on another", "none"])
@pytest.mark.quick("on another", "none")
def test_planned_where_tokens_choose_alike(choice, rng):
    ids, x = jnp.full((9, 2), choice, jnp.int32).at[:, 1].set(-1), normal(rng, 9, 1024)
    of_all = {"num_groups": 3, "dtype": jnp.dtype("float8_e4m3fn")}
    with interpreted():
        found = plan_and_dispatch(x, ids, **of_all)
    right = reference.plan_and_dispatch(x, ids, **of_all)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("float32"), b.astype("float32")), found, right)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "columns", "dtype", "kernels"),
    [
        (64, 8, 2048, "float8_e4m3fn", ["plan_and_dispatch"]),
        (9, 8, 7168, "float8_e5m2", ["plan_and_dispatch"]),
        (64, 17, 2048, "float8_e4m3fn", ["counting_sort", "dispatch_rounded"]),
        (1024, 1, 16384, "float8_e4m3fn", ["counting_sort", "quantize_rows", "dispatch"]),
        (64, 8, 512, "float8_e4m3fn", ["counting_sort", "quantize_rows", "dispatch"]),
    ],
    ids=str,
)
@pytest.mark.quick("64-8-2048-*", "64-17-*")
def test_planned_lowers_for_cuda(num_tokens, top_k, columns, dtype, kernels):
    """In one kernel where that takes it, else one after the other."""
    x, ids = jax.ShapeDtypeStruct((num_tokens, columns), "bfloat16"), jax.ShapeDtypeStruct((num_tokens, top_k), "int32")
    text = str(jax.make_jaxpr(lambda x, ids: plan_and_dispatch(x, ids, num_groups=128, dtype=jnp.dtype(dtype)))(x, ids))
    for kernel in kernels:
        assert kernel in text
    assert ("counting_sort" in text) == ("counting_sort" in kernels)
    lower_for_cuda(lambda x, ids: plan_and_dispatch(x, ids, num_groups=128, dtype=jnp.dtype(dtype)), x, ids)


def test_short_rows_are_refused():
    with raises_saying(NotImplementedError, "dispatch", "at least 128 elements", "19 of float32"):
        jax.eval_shape(dispatch, jnp.zeros((3, 19)), abstract_plan(3, 1))

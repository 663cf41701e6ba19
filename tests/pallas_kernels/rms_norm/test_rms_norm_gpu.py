"""The GPU kernels where there is no GPU: interpreted on the CPU against the reference, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.on_gpu.prefetch import Prefetch
from pallas_kernels.quantize import dequantize
from pallas_kernels.rms_norm import reference
from pallas_kernels.rms_norm.gpu import Config, _launch_row, rms_norm, rms_norm_pullback
from tests.helpers import LIMIT, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda

SMALL = Config(blocks=3)
EPS = 1e-6


def options(dtype, scaling=None, with_sum=False):
    return {"eps": EPS, "out_dtype": jnp.dtype(dtype), "scaling": scaling, "with_sum": with_sum}


@pytest.mark.parametrize(
    ("columns", "dtype", "has_residual"),
    [(512, "float32", False), (1024, "bfloat16", True), (1160, "bfloat16", False), (2880, "float16", True)],
)
@pytest.mark.quick("1024-*", "1160-*")
def test_interpreted(rng, columns, dtype, has_residual):
    x, residual = (normal(rng, 7, columns, dtype=dtype) for _ in range(2))
    x = x.at[2].set(jnp.nan)
    weight = normal(rng, columns)
    args = x, weight, residual if has_residual else None
    with interpreted(detect_races=columns in (512, 1024)):  # what two strips share is written twice
        y, total = rms_norm(*args, **options(dtype, with_sum=has_residual), config=SMALL)
    expected, sums = reference.rms_norm(*args, **options(dtype, with_sum=has_residual))
    assert y.dtype == dtype
    assert np.isnan(y[2]).all()
    fine = jnp.array([0, 1, 3, 4, 5, 6])
    assert relative_error(y[fine], expected[fine]) < LIMIT[dtype]
    assert same_bits(total, sums)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.quick("0.5")
def test_a_weight_before_the_wait_interpreted(rng, share):
    """Of three strips."""
    x, weight = normal(rng, 3, 3072, dtype="bfloat16"), normal(rng, 3072)
    early = Config(blocks=3, prefetch=Prefetch("smem", overlap=0.5, prefetch=share))
    with interpreted():
        y, _ = rms_norm(x, weight, None, **options("bfloat16"), config=early)
    expected, _ = reference.rms_norm(x, weight, None, **options("bfloat16"))
    assert relative_error(y, expected) < LIMIT["bfloat16"]


@pytest.mark.parametrize("scaling", ["1x128", "per_row"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.quick("float8_e4m3fn-1x128", "int8-per_row")
def test_in_8_bits_interpreted(rng, dtype, scaling):
    x = normal(rng, 5, 1024, dtype="bfloat16").at[1].set(0).at[2, 5].set(jnp.nan)
    weight = normal(rng, 1024)
    with interpreted():
        got, _ = rms_norm(x, weight, None, **options(dtype, scaling), config=SMALL)
    expected, _ = reference.rms_norm(x, weight, None, **options(dtype, scaling))
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-6)
    assert np.isnan(got.scale[2]).all()
    fine = jnp.array([0, 1, 3, 4])
    assert relative_error(dequantize(got)[fine], dequantize(expected)[fine]) < 1e-3
    assert (np.asarray(got.values)[fine] != np.asarray(expected.values)[fine]).mean() < 1e-3


@pytest.mark.parametrize(
    ("columns", "dtype", "has_sum"),
    [(512, "float32", False), (1024, "bfloat16", True), (1160, "bfloat16", False), (2880, "float16", True)],
)
@pytest.mark.quick("1024-*", "1160-*")
def test_pullback_interpreted(rng, columns, dtype, has_sum):
    x, dy, dsum = (normal(rng, 7, columns, dtype=dtype) for _ in range(3))
    args = x, normal(rng, columns), dy, dsum if has_sum else None
    with interpreted(detect_races=columns in (512, 1024)):
        got = rms_norm_pullback(*args, eps=EPS, weight_dtype=jnp.dtype("float32"), config=SMALL)
    expected = reference.rms_norm_pullback(*args, eps=EPS, weight_dtype=jnp.dtype("float32"))
    assert relative_error(got[0], expected[0]) < LIMIT[dtype]
    assert relative_error(got[1], expected[1]) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((16384, 7168), "bfloat16"),
        ((64, 2048), "float16"),
        ((5, 128), "float32"),
        ((100, 2880), "bfloat16"),
        ((1_000_000, 4096), "float32"),
        ((7, 16384), "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.quick("(64, 2048)-float16", "(5, 128)-float32")
def test_lowers_for_cuda(shape, dtype):
    x, weight = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[1:], "float32")
    lower_for_cuda(functools.partial(rms_norm, **options(dtype, with_sum=True)), x, weight, x)
    lower_for_cuda(functools.partial(rms_norm, **options("int8", "per_row")), x, weight, None)
    if shape[1] % 1024 == 0:
        lower_for_cuda(functools.partial(rms_norm, **options("float8_e4m3fn", "1x128")), x, weight, None)
    pull = functools.partial(rms_norm_pullback, eps=EPS, weight_dtype=jnp.dtype("float32"))
    lower_for_cuda(pull, x, weight, x, x)


@pytest.mark.parametrize(
    ("columns", "scaling", "parts"),
    [
        (19, None, ["rms_norm", "at least 128 elements", "19 of float32"]),
        (512, "1x128", ["rms_norm", "128", "1024", "512"]),
        (512, "1x64", ["rms_norm", "1x128", "per_row", "1x64"]),
    ],
)
def test_what_is_refused(columns, scaling, parts):
    with raises_saying(NotImplementedError, *parts):
        rms_norm(jnp.zeros((3, columns)), None, None, **options("float8_e4m3fn" if scaling else "float32", scaling))


def test_rows_of_several_strips_by_row_interpreted(rng):
    x = normal(rng, 3, 1160, dtype="bfloat16").at[:, 1100].set(50)
    with interpreted(detect_races=False):
        got, _ = rms_norm(x, None, None, **options("float8_e4m3fn", "per_row"), config=SMALL)
    expected, _ = reference.rms_norm(x, None, None, **options("float8_e4m3fn", "per_row"))
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-6)


def test_pullback_of_rows_as_small_as_eps_interpreted(rng):
    args = 1e-3 * normal(rng, 4, 512), None, normal(rng, 4, 512), None
    with interpreted():
        dx, _ = rms_norm_pullback(*args, eps=EPS, weight_dtype=None, config=SMALL)
    assert relative_error(dx, reference.rms_norm_pullback(*args, eps=EPS, weight_dtype=None)[0]) < LIMIT["float32"]


def test_pullback_of_rows_whose_squares_overflow_interpreted():
    x, dy = jnp.full((4, 512), 3e19).at[1:].set(1.0), jnp.full((4, 512), 1e19)
    with interpreted():
        dx, _ = rms_norm_pullback(x, None, dy, None, eps=EPS, weight_dtype=None, config=SMALL)
    assert (np.asarray(dx[0]) == 0).all()
    assert np.isfinite(dx).all()


@pytest.mark.parametrize(("overlap", "row"), [(None, None), (1.0, 0), (0.5, 4), (0.0, 5)])
def test_each_block_allows_the_next_kernel_by_its_last_row(overlap, row):
    """Of 8 rows, of which 3 blocks take the last one each."""
    assert _launch_row(Prefetch("pdl", overlap=overlap), 8, 3) == row

"""What every backend must give, against formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.rms_norm import rms_norm, rms_norm_in_8_bits
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend

backend = every_backend("rms_norm")

EPS = 1e-6
SHAPES = [(5, 7168), (37, 2880), (1, 128), (200, 256), (3, 19), (2, 3, 8, 64)]


def problem(rng, shape=(37, 256), dtype="float32", weight_dtype="float32"):
    """x, residual, weight, and cotangents of y and s; rows of different sizes."""
    size = jnp.exp(normal(rng, *shape[:-1], 1))
    x, residual, dy, dsum = ((size * normal(rng, *shape)).astype(dtype) for _ in range(4))
    return x, residual, (1 + normal(rng, shape[-1])).astype(weight_dtype), dy, dsum


def formula(x, weight=None):
    """y, n and r in float64."""
    x = float64(x)
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * r * (1 if weight is None else float64(weight)), x * r, r


def run(function, backend, **options):
    return jax.jit(functools.partial(function, backend=backend, **options))


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "weight_dtype"),
    [("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("float16", "float32", "float16")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.quick("xla-*-bfloat16-bfloat16-float32", "xla-(37, 2880)-*", "pallas_tpu-(3, 19)-bfloat16-*")
def test_values(backend, rng, shape, dtype, out_dtype, weight_dtype):
    x, _, weight, *_ = problem(rng, shape, dtype, weight_dtype)
    y = run(rms_norm, backend, out_dtype=out_dtype)(x, weight)
    assert y.dtype == out_dtype
    assert relative_error(y, formula(x, weight)[0]) < LIMIT[out_dtype]


@pytest.mark.quick("xla")
def test_without_a_weight(backend, rng):
    x, *_ = problem(rng)
    assert relative_error(run(rms_norm, backend)(x), formula(x)[0]) < LIMIT["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(37, 2880), (2, 3, 256)], ids=str)
@pytest.mark.quick("*-(37, 2880)-bfloat16")
def test_the_sum_is_rounded_before_it_is_normalised(backend, rng, shape, dtype):
    x, residual, weight, *_ = problem(rng, shape, dtype)
    y, total = jax.jit(lambda x, residual: rms_norm(x, weight, residual=residual, backend=backend))(x, residual)
    assert (y.dtype, total.dtype) == (dtype, dtype)
    assert same_bits(total, (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(dtype))
    assert relative_error(y, formula(total, weight)[0]) < LIMIT[dtype]


@pytest.mark.parametrize("scaling", ["1x128", "per_row", "1x64"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("shape", [(37, 256), (5, 7168)], ids=str)
@pytest.mark.quick("*-(37, 256)-float8_e4m3fn-1x128", "*-(37, 256)-int8-per_row", "xla-(5, 7168)-float8_e5m2-1x64")
def test_in_8_bits_is_the_float32_result_rounded_once(backend, rng, shape, dtype, scaling):
    x, residual, weight, *_ = problem(rng, shape, "bfloat16")
    x = x.at[1, :128].set(0)
    options = {"dtype": dtype, "scaling": scaling, "backend": backend}
    got, total = jax.jit(lambda x, residual: rms_norm_in_8_bits(x, weight, residual=residual, **options))(x, residual)
    expected = quantize(rms_norm(total, weight, out_dtype="float32", backend="xla"), dtype, scaling=scaling)
    assert got.in_8_bits.dtype == dtype
    np.testing.assert_allclose(got.in_8_bits.scale, expected.scale, rtol=1e-6)
    differs = np.asarray(got.in_8_bits.values) != np.asarray(expected.values)
    assert differs.mean() < 1e-3  # float32 sums in another order now and then cross a tie
    assert relative_error(dequantize(got.in_8_bits), dequantize(expected)) < 1e-3
    assert got.array.dtype == x.dtype
    assert relative_error(got.array, formula(total, weight)[0]) < LIMIT["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.quick("*-(37, 2880)-bfloat16", "xla-(200, 256)-float32", "xla-(2, 3, 8, 64)-float16")
def test_gradients(backend, rng, shape, dtype):
    x, residual, weight, dy, dsum = problem(rng, shape, dtype)

    @jax.jit
    def pull(x, residual, weight):
        def norm(x, residual, weight):
            return rms_norm(x, weight, residual=residual, eps=EPS, backend=backend)

        (_, total), pullback = jax.vjp(norm, x, residual, weight)
        return total, pullback((dy, dsum))

    total, (dx, dresidual, dweight) = pull(x, residual, weight)
    _, n, r = formula(total, weight)
    g = float64(dy) * float64(weight)
    expected = r * (g - n * (n * g).mean(-1, keepdims=True)) + float64(dsum)
    assert (dx.dtype, dweight.dtype) == (dtype, "float32")
    assert relative_error(dx, expected) < LIMIT[dtype]
    assert same_bits(dx, dresidual)
    assert relative_error(dweight, (float64(dy) * n).reshape(-1, shape[-1]).sum(0)) < LIMIT["float32"]


@pytest.mark.parametrize("argument", ["x", "weight"])
@pytest.mark.quick("xla-*")
def test_gradients_of_one_alone(backend, rng, argument):
    x, _, weight, dy, _ = problem(rng)
    operands = {"x": x, "weight": weight}

    def loss(function, operand):
        return (function(**operands | {argument: operand}) * dy).sum()

    plain = jax.grad(functools.partial(loss, lambda x, weight: x * _scale(x) * weight))
    ours = jax.grad(functools.partial(loss, functools.partial(rms_norm, backend=backend)))
    assert relative_error(jax.jit(ours)(operands[argument]), plain(operands[argument])) < LIMIT["float32"]


def _scale(x):
    return jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS)


@pytest.mark.quick("xla")
def test_gradients_pass_the_rounding(backend, rng):
    """They are those of the array, whether products take the 8 bits of it or not; and the sum's own come on top."""
    x, residual, weight, dy, dsum = problem(rng)

    def in_8_bits(x, residual, weight):
        rounded, total = rms_norm_in_8_bits(x, weight, residual=residual, backend=backend)
        return rounded.array, total

    def plain(x, residual, weight):
        return rms_norm(x, weight, residual=residual, backend=backend)

    got, expected = (
        jax.jit(lambda *args, f=f: jax.vjp(f, *args)[1]((dy, dsum)))(x, residual, weight) for f in (in_8_bits, plain)
    )
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))


def test_a_fault_stays_in_its_row(backend, rng):
    x, _, weight, *_ = problem(rng)
    x = x.at[3, 5].set(jnp.nan)
    y = run(rms_norm, backend)(x, weight)
    rounded = run(rms_norm_in_8_bits, backend, dtype="int8")(x, weight).in_8_bits
    for rows in (np.isnan(y), np.isnan(rounded.scale)):
        assert rows[3].all()
        assert rows.sum() == rows.shape[1]


def test_rows_of_zeros(backend):
    x = jnp.zeros((4, 256), jnp.bfloat16)
    y, pullback = jax.vjp(lambda x: rms_norm(x, jnp.ones(256), backend=backend), x)
    assert same_bits(y, x)
    assert np.isfinite(float64(pullback(y)[0])).all()
    rounded = rms_norm_in_8_bits(x, backend=backend).in_8_bits
    assert not float64(rounded.values).any()
    assert (np.asarray(rounded.scale) == 1).all()


def test_the_gradient_of_a_row_whose_squares_overflow_is_zero(backend):
    x = jnp.full((8, 256), 3e19).at[1:].set(1.0)
    _, pullback = jax.vjp(lambda x: rms_norm(x, jnp.ones(256), backend=backend), x)
    (dx,) = pullback(jnp.full((8, 256), 1e19))
    assert (np.asarray(dx[0]) == 0).all()
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("size", [1e-30, 1e15])
@pytest.mark.quick("xla-*")
def test_tiny_and_huge_rows(backend, rng, size):
    x = size * normal(rng, 8, 256)
    assert relative_error(run(rms_norm, backend)(x), formula(x)[0]) < LIMIT["float32"]


def test_no_rows(backend):
    x, weight = jnp.zeros((0, 256)), jnp.ones(256)
    (y, total), pullback = jax.vjp(lambda x, w: rms_norm(x, w, residual=x, backend=backend), x, weight)
    assert (y.shape, total.shape) == ((0, 256), (0, 256))
    dx, dweight = pullback((y, total))
    assert dx.shape == (0, 256)
    assert same_bits(dweight, jnp.zeros(256))
    rounded = rms_norm_in_8_bits(x, backend=backend).in_8_bits
    assert (rounded.shape, rounded.scale.shape) == ((0, 256), (0, 2))


@pytest.mark.slow
def test_same_inputs_same_bits(backend, rng):
    x, residual, weight, dy, dsum = problem(rng, dtype="bfloat16")

    @jax.jit
    def both(x, weight):
        out, pullback = jax.vjp(lambda x, w: rms_norm(x, w, residual=residual, backend=backend), x, weight)
        return out, pullback((dy, dsum))

    assert same_bits(both(x, weight), both(x, weight))


@pytest.mark.parametrize(
    ("x", "options", "parts"),
    [
        (jnp.ones((2, 8), jnp.int32), {}, ["x", "BF16, FP16 or float32", "int32"]),
        (jnp.ones((2, 8), jnp.float8_e4m3fn), {}, ["x", "float8_e4m3fn"]),
        (jnp.ones((2, 0)), {}, ["x", "[..., H]", "[2, 0]"]),
        (jnp.ones((2, 8)), {"weight": jnp.ones(4)}, ["weight", "[H] = [8]", "[4]"]),
        (jnp.ones((2, 8)), {"residual": jnp.ones((1, 8))}, ["residual", "[2, 8]", "[1, 8]"]),
        (jnp.ones((2, 8)), {"eps": -1e-6}, ["eps", "from 0 on", "-1e-06"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(x, options, parts):
    with raises_saying(ValueError, *parts):
        rms_norm(x, **options)


@pytest.mark.parametrize(
    ("shape", "options", "parts"),
    [
        ((2, 3, 128), {}, ["x", "[T, H]", "[2, 3, 128]"]),
        ((2, 192), {}, ["192", "128"]),
        ((2, 128), {"scaling": "per_tensor"}, ["scaling", "per_tensor", "scales of its own"]),
        ((2, 128), {"dtype": "int4"}, ["dtype", "int8", "int4"]),
    ],
)
def test_errors_of_results_in_8_bits(shape, options, parts):
    with raises_saying(ValueError, *parts):
        rms_norm_in_8_bits(jnp.ones(shape), **options)

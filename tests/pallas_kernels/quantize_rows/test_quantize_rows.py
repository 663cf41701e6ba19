"""What every backend must give: the bits of `quantize`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import Rounded, quantize
from pallas_kernels.quantize_rows import quantize_rows, rounded, rows_in_8_bits
from tests.helpers import raises_saying, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.quantize_rows.rows import CRUEL, assert_equal, cruel, expected, random

backend = every_backend("quantize_rows")

SHAPES = [(1, 128), (1, 2048), (7, 384), (8, 7168), (64, 2048), (37, 128), (3, 5, 256), (0, 128)]


def run(backend, x, dtype):
    return jax.jit(lambda x: quantize_rows(x, dtype, backend=backend))(x)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.quick("xla-(7, 384)-bfloat16-*", "xla-(3, 5, 256)-float32-*m3fn", "xla-(0, 128)-float16-*m3fn")
def test_values(backend, rng, shape, of, dtype):
    x = random(rng, shape, of)
    assert_equal(run(backend, x, dtype), x, dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CRUEL)
@pytest.mark.quick("xla-nan-bfloat16-*", "xla-zeros-float16-*m3fn", "xla-subnormal-float32-*m2")
def test_cruel_values(backend, rng, case, of, dtype):
    x = cruel(rng, case, of)
    got = run(backend, x, dtype)
    assert_equal(got, x, dtype)
    rest = np.ones((9, 2), bool)
    rest[4, 1] = not case.endswith(("nan", "infinity"))
    np.testing.assert_array_equal(np.isfinite(got.scale), rest)
    if case.endswith("zeros") or (case == "subnormal" and of != "float16"):
        assert got.scale[4, 1] == 1


@pytest.mark.slow
def test_as_large_as_a_layer(backend, rng):
    x = random(rng, (8191, 2048), "bfloat16")
    assert_equal(run(backend, x, "float8_e4m3fn"), x, "float8_e4m3fn")


def test_under_transformations(backend, rng):
    x = random(rng, (4, 8, 256), "bfloat16")
    of_rows = functools.partial(quantize_rows, backend=backend)
    reference = expected(x, "float8_e4m3fn")
    for way in (jax.vmap(of_rows), jax.checkpoint(of_rows), lambda x: jax.lax.map(of_rows, x)):
        assert same_bits(jax.jit(way)(x), reference)


def test_nobody_rounds_what_nobody_uses():
    def lowered(function):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct((16, 256), jnp.bfloat16))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    of = functools.partial(rounded, dtype="float8_e4m3fn", scaling="1x128", backend="auto")
    assert "quantize_rows" in lowered(lambda x: of(x).in_8_bits.scale)
    assert "quantize_rows" not in lowered(lambda x: of(x).array)


@pytest.mark.parametrize(
    ("of", "dtype", "scaling", "has_a_kernel"),
    [
        ("bfloat16", "float8_e5m2", "1x128", True),
        ("bfloat16", "int8", "1x128", False),
        ("bfloat16", "float8_e4m3fn", "per_row", False),
        ("float32", "float8_e4m3fn", "1x64", False),
    ],
)
def test_other_scalings_and_dtypes(rng, of, dtype, scaling, has_a_kernel):
    """By the kernel where it can, and never an error where it cannot, whatever backend is named."""
    x = random(rng, (8, 256), of)
    got = jax.jit(functools.partial(rows_in_8_bits, dtype=dtype, scaling=scaling, backend="auto"))(x)
    assert same_bits(got, jax.jit(functools.partial(quantize, dtype=dtype, scaling=scaling))(x))
    on_a_gpu = functools.partial(rows_in_8_bits, dtype=dtype, scaling=scaling, backend="pallas_gpu")
    text = jax.jit(on_a_gpu).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert ("quantize_rows" in text) == has_a_kernel


def test_gradients_pass_the_rounding_to_the_array(rng):
    x, direction = random(rng, (2, 128), "float32"), random(rng, (2, 128), "float32")

    def loss(x) -> jax.Array:
        found: Rounded = rounded(x, "float8_e4m3fn", scaling="1x128", backend="auto")
        return jnp.sum(found.array**2) + jnp.sum(found.in_8_bits.scale)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), 2 * x, rtol=1e-6)
    _, tangent = jax.jit(lambda *args: jax.jvp(loss, args[:1], args[1:]))(x, direction)
    np.testing.assert_allclose(tangent, jnp.sum(2 * x * direction), rtol=1e-5)


def test_no_gradient_passes(rng):
    x = random(rng, (1, 128), "float32")
    with raises_saying(TypeError, "quantize_rows", "stop_gradient"):
        jax.grad(lambda x: quantize_rows(x).scale.sum())(x)


@pytest.mark.parametrize(
    ("x", "options", "parts"),
    [
        (jnp.ones(128), {}, ["2 dimensions", "(128,)"]),
        (jnp.ones((4, 128), jnp.int8), {}, ["x", "floating point", "int8[4, 128]"]),
        (jnp.ones((4, 192)), {}, ["192", "128"]),
        (jnp.ones((4, 128)), {"dtype": "int4"}, ["dtype", "int8", "int4"]),
        (jnp.ones((4, 128)), {"backend": "cuda"}, ["backend", "pallas_gpu", "cuda"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(x, options, parts):
    with raises_saying(ValueError, *parts):
        quantize_rows(x, **options)

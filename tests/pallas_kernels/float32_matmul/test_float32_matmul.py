"""A product as precise as its factors in float32, on matrix units that take BF16."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.float32_matmul import float32_matmul, gpu
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.pallas_kernels.backends import every_backend

backend = every_backend("float32_matmul")
DTYPES = ["float32", "bfloat16", "float16"]


def factors(rng, lhs: str, rhs: str, depth: int = 256) -> tuple[jax.Array, jax.Array]:
    return normal(rng, 100, depth, dtype=lhs), normal(rng, depth, 24, dtype=rhs)


@pytest.mark.parametrize("rhs", DTYPES)
@pytest.mark.parametrize("lhs", DTYPES)
def test_as_precise_as_float32(lhs, rhs, backend, rng):
    x, y = factors(rng, lhs, rhs)
    product = jax.jit(lambda x, y: float32_matmul(x, y, backend=backend))(x, y)
    assert product.dtype == jnp.float32
    assert relative_error(product, float64(x) @ float64(y)) < LIMIT["float32"]


@pytest.mark.parametrize(("lhs", "rhs"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("depth", [16, 256])
@pytest.mark.parametrize("out", DTYPES)
def test_in_parts_on_any_platform(lhs, rhs, out, depth, rng):
    """What a GPU does, here: all of the three parts of a number, and of two what 16 bits can show.

    Parts lie along the depth where that is less than what they would be multiplied along.
    """
    x, y = factors(rng, lhs, rhs, depth)
    product = jax.jit(lambda x, y: gpu.float32_matmul(x, y, out_dtype=jnp.dtype(out)))(x, y)
    expected = float64(x) @ float64(y)
    exact = jnp.asarray(expected, jnp.float32).astype(out)
    assert product.dtype == jnp.dtype(out)
    assert relative_error(product, expected) < max(1e-6, 1.01 * relative_error(exact, expected))


def test_gradients_have_the_types_of_the_factors(backend, rng):
    x, kernel, dout = normal(rng, 20, 64, dtype="bfloat16"), normal(rng, 64, 8), normal(rng, 20, 8)

    def pullback(x, kernel):
        return jax.vjp(lambda *both: float32_matmul(*both, backend=backend), x, kernel)[1](dout)

    dx, dkernel = jax.jit(pullback)(x, kernel)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative_error(dx, float64(dout) @ float64(kernel).T) < LIMIT["bfloat16"]
    assert relative_error(dkernel, float64(x).T @ float64(dout)) < LIMIT["float32"]


def test_no_product_of_float32_on_a_gpu(rng):
    """Forward and backward: such a product is for no matrix unit."""
    x, kernel = normal(rng, 32, 64, dtype="bfloat16"), normal(rng, 64, 8)

    def step(x, kernel):
        y, pullback = jax.vjp(float32_matmul, x, kernel)
        return y, pullback(jnp.sin(y))

    def products(platform: str) -> list[str]:
        text = jax.jit(step).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return [line.partition(" : ")[2].partition(" -> ")[0] for line in text.splitlines() if "dot_general" in line]

    on_gpu = products("cuda")
    assert len(on_gpu) == 3
    assert all(line.count("bf16>") == 2 for line in on_gpu)
    assert any("tensor<64x24xbf16>" in line for line in on_gpu)  # the three parts of each weight
    assert not any("bf16" in line for line in products("cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_gradient_of_tokens_is_written_once_on_a_gpu(dtype):
    """And in its own type: of many tokens, no array of float32 has as many numbers."""
    x, dout = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16), jax.ShapeDtypeStruct((256, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((64, 8), dtype)

    def gradients(x, kernel, dout):
        return jax.vjp(float32_matmul, x, kernel)[1](dout)

    text = jax.jit(gradients).trace(x, kernel, dout).lower(lowering_platforms=("cuda",)).as_text()
    results = [line.rpartition("-> ")[2] for line in text.splitlines() if "dot_general" in line]
    assert [result for result in results if "256x64" in result] == ["tensor<256x64xbf16>"]
    assert "x64xf32" not in text.replace("tensor<8x64xf32>", "")  # the router's weights alone


def test_sizes_that_are_symbols():
    """No kernel is cut for them, so that a GPU need not fall back, which would be a warning."""
    (tokens,) = jax.export.symbolic_shape("t")
    shapes = jax.ShapeDtypeStruct((tokens, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 8), jnp.float32)
    exported = jax.export.export(jax.jit(float32_matmul), platforms=["cuda"])(*shapes)
    assert "bf16" in exported.mlir_module()


def test_errors():
    with raises_saying(ValueError, "lhs and rhs must be [M, K] and [K, N], got [2, 3] and [2, 4]"):
        float32_matmul(jnp.ones((2, 3)), jnp.ones((2, 4)))

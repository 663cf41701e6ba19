import jax
import jax.numpy as jnp
import pytest

from moejax.router_logits import _in_bfloat16, router_logits
from tests.helpers import LIMIT, float64, normal, relative_error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_as_precise_as_float32(rng, dtype):
    x, kernel = normal(rng, 100, 256, dtype=dtype), normal(rng, 256, 24)
    logits = jax.jit(router_logits)(x, kernel)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, float64(x) @ float64(kernel)) < LIMIT["float32"]


def test_three_parts_of_a_weight_are_all_of_it(rng):
    x, kernel = normal(rng, 100, 256, dtype="bfloat16"), normal(rng, 256, 24)
    assert relative_error(jax.jit(_in_bfloat16)(x, kernel), float64(x) @ float64(kernel)) < 1e-6


def test_gradients(rng):
    x, kernel, dlogits = normal(rng, 20, 64, dtype="bfloat16"), normal(rng, 64, 8), normal(rng, 20, 8)
    dx, dkernel = jax.jit(lambda *operands: jax.vjp(router_logits, *operands)[1](dlogits))(x, kernel)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative_error(dx, float64(dlogits) @ float64(kernel).T) < LIMIT["bfloat16"]
    assert relative_error(dkernel, float64(x).T @ float64(dlogits)) < LIMIT["float32"]


def test_forward_mode_and_the_product_of_each_platform(rng):
    x, kernel = normal(rng, 20, 64, dtype="bfloat16"), normal(rng, 64, 8)
    dx, dkernel = normal(rng, 20, 64, dtype="bfloat16"), normal(rng, 64, 8)
    _, dlogits = jax.jvp(router_logits, (x, kernel), (dx, dkernel))
    expected = float64(dx) @ float64(kernel) + float64(x) @ float64(dkernel)
    assert relative_error(dlogits, expected) < LIMIT["float32"]

    def products(platform: str) -> str:
        text = jax.jit(router_logits).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return next(line for line in text.splitlines() if "dot_general" in line)

    assert "tensor<64x24xbf16>" in products("cuda")  # the three parts of each weight
    assert "tensor<64x8xf32>" in products("cpu")

"""Weights that come with what they are in 8 bits: the bits of products that round them."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_rounded, grouped_matmul
from pallas_kernels.quantize import Quantization, RoundedWeights
from pallas_kernels.quantize_transpose import quantize_transpose
from tests.helpers import normal, raises_saying, same_bits

SIZES = jnp.array([10, 0, 25], jnp.int32)
QUANTIZATIONS = {
    "forward": Quantization(),
    "rows": Quantization(gradient_dtype="float8_e4m3fn"),
    "all": Quantization(gradient_dtype="float8_e5m2", weights_gradient_dtype="float8_e4m3fn"),
}


def activated_and_rounded(*args, **options):
    return grouped_gate_up_rounded(*args, **options).array


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=list(QUANTIZATIONS))
@pytest.mark.parametrize("product", [grouped_matmul, grouped_gate_up, activated_and_rounded])
def test_values_and_gradients_are_those_of_arrays(rng, product, quantization):
    x, w = normal(rng, 40, 256, dtype="bfloat16"), normal(rng, 3, 256, 512)
    k_major, n_last = quantize_transpose(w)

    def loss(x, w, rounded):
        rhs = w if rounded is None else RoundedWeights(w, *rounded)
        return jnp.square(product(x, rhs, SIZES, quantization=quantization).astype(jnp.float32)).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    assert same_bits(run(x, w, (k_major, n_last)), run(x, w, None))


def test_layouts_that_do_not_fit_are_named(rng):
    x, w = normal(rng, 40, 256), normal(rng, 3, 256, 128)
    k_major, n_last = quantize_transpose(w)
    with raises_saying(ValueError, "rhs.k_major must be float8_e4m3fn[3, 128, 256], got float8_e4m3fn[3, 256, 128]"):
        grouped_matmul(x, RoundedWeights(w, n_last, n_last), SIZES, quantization=Quantization())
    with raises_saying(ValueError, "rhs that are RoundedWeights lie as [G, K, N], got transpose_rhs=True"):
        square = RoundedWeights(w[:, :128], *quantize_transpose(w[:, :128]))
        grouped_matmul(x[:, :128], square, SIZES, transpose_rhs=True, quantization=Quantization())
    with raises_saying(ValueError, "rhs.n_last must be float8_e4m3fn[3, 256, 128], got float8_e5m2[3, 256, 128]"):
        mixed = RoundedWeights(w, k_major, quantize_transpose(w, "float8_e5m2")[1])
        grouped_matmul(x, mixed, SIZES, quantization=Quantization())
    with raises_saying(ValueError, "rhs that are RoundedWeights are multiplied with a quantization, got None"):
        grouped_matmul(x, RoundedWeights(w, k_major, None), SIZES)

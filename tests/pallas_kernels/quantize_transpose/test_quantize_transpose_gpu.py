"""The GPU kernel where there is no GPU: interpreted on the CPU against the reference, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.quantize_transpose import reference
from pallas_kernels.quantize_transpose.gpu import Config, quantize_transpose
from tests.helpers import float64, raises_saying, same_bits
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda
from tests.pallas_kernels.quantize_transpose.weights import CRUEL, cruel, random

FEW = Config(blocks_per_core=1)


def both(weights, dtype="float8_e4m3fn", k_major=True, n_last=True, config=FEW):
    options = {"dtype": jnp.dtype(dtype), "k_major": k_major, "n_last": n_last}
    with interpreted(), single_view(True):
        got = quantize_transpose(weights, **options, config=config)
    return got, jax.jit(functools.partial(reference.quantize_transpose, **options))(weights)


@pytest.mark.parametrize(("k_major", "n_last"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.quick("float16-float8_e4m3fn-True-False", "bfloat16-*e4m3fn-False-True", "float32-*e5m2-True-True")
def test_interpreted(rng, of, dtype, k_major, n_last):
    got, expected = both(random(rng, (2, 256, 384), of), dtype, k_major, n_last)
    assert same_bits(got, expected)


@pytest.mark.parametrize("config", [Config(1, 2), Config(1, 3)], ids=["two", "three"])
@pytest.mark.parametrize("shape", [(1, 128, 128), (1, 128, 512), (3, 384, 128)], ids=str)
@pytest.mark.quick("(1, 128, 128)-two", "(3, 384, 128)-three")
def test_several_tiles_on_their_way_interpreted(rng, monkeypatch, shape, config):
    """In one or two blocks, which thus take several tiles each."""
    monkeypatch.setattr("pallas_kernels.quantize_transpose.gpu._most_blocks", lambda chip, config: 2)
    got, expected = both(random(rng, shape, "bfloat16"), config=config)
    assert same_bits(got, expected)


@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CRUEL)
@pytest.mark.quick(
    "nan-float32", "infin*-bfloat16", "minus z*-float16", "subn*-float32", "huge-float16", "ties-bfloat16"
)
def test_cruel_values_interpreted(rng, case, of):
    got, expected = both(cruel(rng, case, of))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(float64(ours), float64(theirs))  # the sign of a NaN is left open


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(128, 2048, 1536), (128, 768, 2048), (32, 7168, 4096), (1, 128, 128)], ids=str)
@pytest.mark.quick("(128, 768, 2048)-bfloat16", "(1, 128, 128)-float32")
def test_lowers_for_cuda(shape, dtype):
    options = {"dtype": jnp.dtype("float8_e4m3fn"), "k_major": True, "n_last": True}
    lower_for_cuda(functools.partial(quantize_transpose, **options), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize(
    ("weights", "dtype", "parts"),
    [
        (jnp.ones((1, 128, 128)), "int8", ["quantize_transpose", "float8_e5m2", "int8"]),
        (jnp.ones((1, 128, 192)), "float8_e4m3fn", ["quantize_transpose", "128", "[1, 128, 192]"]),
        (jnp.ones((0, 128, 128)), "float8_e4m3fn", ["quantize_transpose", "positive", "[0, 128, 128]"]),
    ],
)
def test_what_is_refused(weights, dtype, parts):
    with raises_saying(NotImplementedError, *parts):
        quantize_transpose(weights, dtype=jnp.dtype(dtype), k_major=True, n_last=True)

"""The GPU kernel where there is no GPU: interpreted on the CPU against `quantize`, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.quantize_rows.gpu import Config, quantize_rows
from tests.helpers import raises_saying
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda
from tests.pallas_kernels.quantize_rows.rows import CRUEL, assert_equal, cruel, random

SMALL = Config(blocks=8, programs_per_core=1)


def check(x, dtype="float8_e4m3fn", config=SMALL):
    whole_tiles = x.size // 128 % config.blocks == 0  # what two tiles share is written twice
    with interpreted(detect_races=whole_tiles):
        got = quantize_rows(x, dtype=jnp.dtype(dtype), config=config)
    assert_equal(got, x, dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1024), (8, 256), (3, 2, 512)], ids=str)
@pytest.mark.quick("(1, 1024)-bfloat16-*m3fn", "(8, 256)-float32-*m2", "(3, 2, 512)-float16-*m3fn")
def test_interpreted(rng, shape, of, dtype):
    check(random(rng, shape, of), dtype)


@pytest.mark.parametrize("config", [SMALL, Config(32, 1)], ids=["small", "large"])
@pytest.mark.parametrize("shape", [(37, 256), (1, 1152), (129, 128), (48, 256)], ids=str)
@pytest.mark.quick("(37, 256)-large", "(1, 1152)-small")
def test_several_tiles_of_a_program_interpreted(rng, monkeypatch, shape, config):
    """The last one ends with the rows, which no tile divides."""
    monkeypatch.setattr("pallas_kernels.quantize_rows.gpu._most_programs", lambda chip, config: 2)
    check(random(rng, shape, "bfloat16"), config=config)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CRUEL)
@pytest.mark.quick(
    "nan-float32-*m3fn",
    "infin*-bfloat16-*m2",
    "minus z*-float16-*m3fn",
    "subn*-float32-*m3fn",
    "huge-float16-*m2",
    "ties-bfloat16-*m3fn",
)
def test_cruel_values_interpreted(rng, case, of, dtype):
    check(cruel(rng, case, of), dtype)


@pytest.mark.parametrize("of", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(32768, 2048), (4096, 7168), (8, 7168), (1, 1152), (1 << 20, 8192)], ids=str)
@pytest.mark.quick("(8, 7168)-bfloat16", "(1048576, 8192)-float32")
def test_lowers_for_cuda(shape, of):
    kernel = functools.partial(quantize_rows, dtype=jnp.dtype("float8_e4m3fn"))
    lower_for_cuda(kernel, jax.ShapeDtypeStruct(shape, of))


@pytest.mark.parametrize("shape", [(1, 896), (7, 128), (0, 256)], ids=str)
def test_what_is_left_to_xla(rng, shape):
    x = random(rng, shape, "bfloat16")
    text = jax.jit(functools.partial(quantize_rows, dtype=jnp.dtype("float8_e4m3fn"))).lower(x).as_text()
    assert "mosaic" not in text
    assert_equal(jax.jit(functools.partial(quantize_rows, dtype=jnp.dtype("float8_e4m3fn")))(x), x, "float8_e4m3fn")


@pytest.mark.parametrize(
    ("x", "dtype", "parts"),
    [
        (jnp.ones((8, 128)), "int8", ["quantize_rows", "float8_e5m2", "int8"]),
        (jnp.ones((8, 192)), "float8_e4m3fn", ["quantize_rows", "128", "[8, 192]"]),
    ],
)
def test_what_is_refused(x, dtype, parts):
    with raises_saying(NotImplementedError, *parts):
        quantize_rows(x, dtype=jnp.dtype(dtype))

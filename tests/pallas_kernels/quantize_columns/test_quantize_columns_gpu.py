"""The GPU kernel where there is no GPU: interpreted on the CPU against rows placed with numpy, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize_columns.gpu import Config, quantize_columns
from tests.helpers import raises_saying
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda
from tests.pallas_kernels.quantize_columns.rows import SIZES, UNOWNED, assert_equal, expected, random, random_ids

CONFIGS = {"one": Config(warpgroups=1, blocks=1), "several": Config(warpgroups=3, blocks=2, strips=2)}


def check(x, sizes, row_ids=None, dtype="float8_e4m3fn", config="one"):
    with interpreted():
        got = quantize_columns(x, jnp.asarray(sizes), row_ids, dtype=jnp.dtype(dtype), config=CONFIGS[config])
    assert_equal(got, expected(x, sizes, row_ids, dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("features", [128, 512])
@pytest.mark.slow
def test_interpreted(rng, features, of, dtype):
    """With rows that no group owns, NaN all of them."""
    sizes = SIZES["ragged"]
    x = random(rng, (sum(sizes) + UNOWNED, features), of).at[sum(sizes) :].set(np.nan)
    check(x, sizes, dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.quick("ragged-one")
def test_rows_of_tokens_interpreted(rng, sizes, config):
    sizes = SIZES[sizes]
    x, ids = random(rng, (40, 512), "bfloat16"), random_ids(rng, sum(sizes) + UNOWNED, 40)
    check(x, sizes, ids, config=config)


@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.quick("bfloat16")
def test_cruel_values_interpreted(rng, of):
    """A feature with each, beside ones that it must not touch: two lie in one word."""
    x, info = np.asarray(random(rng, (130, 256), of)).copy(), jnp.finfo(of)
    for feature, value in enumerate([np.nan, np.inf, -np.inf, float(info.max), -np.nan]):
        x[rng.integers(128), 3 * feature] = np.asarray(value, x.dtype)
    x[:, 15], x[:, 18] = 0, -0.0
    x[:, 21] = np.asarray(rng.integers(-5, 6, size=130) * float(info.smallest_subnormal), x.dtype)
    x[:, 24] = np.asarray(rng.integers(-64, 64, size=130) * 0.25 + 16.5, x.dtype)  # ties, of a scale of one
    x[::128, 24] = 448
    check(jnp.asarray(x), (128, 2))


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "features", "of"),
    [(32768, 262144, 2048, "bfloat16"), (1 << 20, 1 << 20, 8192, "float32"), (4096, 32768, 1408, "float16")],
)
@pytest.mark.quick("1048576-*")
def test_lowers_for_cuda(num_tokens, num_rows, features, of):
    lower_for_cuda(
        functools.partial(quantize_columns, dtype=jnp.dtype("float8_e4m3fn")),
        jax.ShapeDtypeStruct((num_tokens, features), of),
        jax.ShapeDtypeStruct((128,), "int32"),
        jax.ShapeDtypeStruct((num_rows,), "int32"),
    )


@pytest.mark.parametrize(
    ("x", "dtype", "parts"),
    [
        (jnp.ones((8, 128)), "int8", ["quantize_columns", "float8_e5m2", "int8"]),
        (jnp.ones((8, 192)), "float8_e4m3fn", ["quantize_columns", "128", "[8, 192]"]),
    ],
)
def test_what_is_refused(x, dtype, parts):
    with raises_saying(NotImplementedError, *parts):
        quantize_columns(x, jnp.asarray([8]), dtype=jnp.dtype(dtype))

"""Products of 1 to 1024 rows, against float64; what no tile divides, what is not finite, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import gated_halves
from pallas_kernels.dense_matmul import dense_gate_up, dense_matmul
from tests.helpers import float64, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend

backend = every_backend("dense_matmul")

TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-6}
"""Of one rounding, and of sums of some thousand products: a second rounding would be noticed."""


def operands(rng, rows: int, depth: int, columns: int, *, dtype="bfloat16", windows=1) -> tuple[jax.Array, jax.Array]:
    shape = (depth, columns) if windows == 1 else (depth, windows, columns)
    return normal(rng, rows, depth, dtype=dtype), normal(rng, *shape, dtype=dtype) / depth**0.5


def expected_gate_up(lhs: jax.Array, rhs: jax.Array, activation: str = "silu", limit: float | None = None):
    h = float64(lhs) @ float64(rhs).reshape(rhs.shape[0], -1)
    return float64(gated_halves(jnp.asarray(h, jnp.float32), activation, limit))


SIZES = [
    (512, 2048, 2048),
    (256, 4096, 2048),
    (1024, 512, 1024),
    (64, 2048, 512),
    (129, 520, 192),
    (1, 64, 64),
    (37, 1024, 512),
    (300, 72, 960),
    (130, 8, 64),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
@pytest.mark.quick("xla-plain-bfloat16-(129*", "xla-residual-float16-(1, *", "pallas_gpu*")
def test_product_equals_float64(sizes, dtype, adds, backend, rng):
    lhs, rhs = operands(rng, *sizes, dtype=dtype)
    residual = normal(rng, sizes[0], sizes[2], dtype=dtype) if adds else None
    y = jax.jit(lambda *a: dense_matmul(*a[:2], residual=a[2], backend=backend))(lhs, rhs, residual)
    expected = float64(lhs) @ float64(rhs) + (float64(residual) if adds else 0)
    assert (y.shape, y.dtype) == ((sizes[0], sizes[2]), lhs.dtype)
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("activation", "limit"), [("silu", None), ("gelu_tanh", None), ("swigluoai", 0.5)], ids=str)
@pytest.mark.quick("xla-silu-None-(129*", "xla-swigluoai-0.5-(129*", "pallas_gpu*")
def test_gate_up_equals_float64(sizes, activation, limit, backend, rng):
    lhs, rhs = operands(rng, *sizes, windows=2)
    options = {"activation": activation, "activation_limit": limit, "backend": backend}
    y = jax.jit(lambda *a: dense_gate_up(*a, **options))(lhs, rhs)
    assert (y.shape, y.dtype) == ((sizes[0], sizes[2]), lhs.dtype)
    assert relative_error(y, expected_gate_up(lhs, rhs, activation, limit)) < TOLERANCE["bfloat16"]


def test_a_sum_onto_a_residual_is_rounded_once(backend, rng):
    """What a residual that cancels the rounded product leaves is what rounding it took away."""
    lhs, rhs = operands(rng, 70, 512, 128, dtype="float16")
    product = float64(lhs) @ float64(rhs)
    residual = -jnp.asarray(product, "float16")
    y = dense_matmul(lhs, rhs, residual=residual, backend=backend)
    assert relative_error(y, product + float64(residual)) < 2e-2


def test_float32_is_multiplied_as_such(backend, rng):
    lhs, rhs = operands(rng, 70, 300, 40, dtype="float32")
    assert relative_error(dense_matmul(lhs, rhs, backend=backend), float64(lhs) @ float64(rhs)) < TOLERANCE["float32"]


def test_what_is_not_finite_stays_in_its_row_and_column(backend, rng):
    lhs, rhs = operands(rng, 200, 512, 320)
    expected = float64(lhs) @ float64(rhs)
    y = np.asarray(dense_matmul(lhs.at[77, 3].set(jnp.nan), rhs.at[500, 130].set(jnp.inf), backend=backend))
    assert np.isnan(y[77]).all()
    assert not np.isfinite(y[:, 130]).any()
    others = np.ix_(np.arange(200) != 77, np.arange(320) != 130)
    assert relative_error(y[others], expected[others]) < TOLERANCE["bfloat16"]


def test_same_bits_again(backend, rng):
    lhs, rhs = operands(rng, 256, 1024, 512)
    run = jax.jit(lambda *a: dense_matmul(*a, residual=jnp.ones((256, 512), "bfloat16"), backend=backend))
    first = run(lhs, rhs)
    assert all(same_bits(first, run(lhs, rhs)) for _ in range(10))


def test_nothing_to_multiply(backend):
    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.bfloat16)

    assert dense_matmul(zeros(0, 64), zeros(64, 32), backend=backend).shape == (0, 32)
    assert dense_gate_up(zeros(5, 64), zeros(64, 2, 0), backend=backend).shape == (5, 0)
    nothing = dense_matmul(zeros(5, 0), zeros(0, 32), residual=zeros(5, 32) + 2, backend=backend)
    assert (nothing == 2).all()


def test_errors(rng):
    lhs, rhs = operands(rng, 16, 64, 32)
    with raises_saying(TypeError, "rhs must be an array, got None"):
        dense_matmul(lhs, None)
    with raises_saying(TypeError, "residual must be an array, got int"):
        dense_matmul(lhs, rhs, residual=1)
    with raises_saying(ValueError, "lhs must be [M, K]", "bfloat16[2, 8, 64]"):
        dense_matmul(lhs.reshape(2, 8, 64), rhs)
    with raises_saying(ValueError, "lhs must be", "int32[16, 64]"):
        dense_matmul(lhs.astype("int32"), rhs)
    with raises_saying(ValueError, "rhs must be [K, N] of the dtype of lhs", "K = 64", "bfloat16[32, 64]"):
        dense_matmul(lhs, rhs.T)
    with raises_saying(ValueError, "rhs must be", "float32[64, 32]"):
        dense_matmul(lhs, rhs.astype("float32"))
    with raises_saying(ValueError, "rhs must be [K, 2, N]", "bfloat16[64, 32]"):
        dense_gate_up(lhs, rhs)
    with raises_saying(ValueError, "residual must be [M, N]", "bfloat16[16, 32]", "bfloat16[16, 64]"):
        dense_matmul(lhs, rhs, residual=lhs)
    with raises_saying(ValueError, "unknown activation 'swish'"):
        dense_gate_up(lhs, rhs.reshape(64, 2, 16), activation="swish")
    with pytest.raises(NotImplementedError, match="dense_matmul"):
        jax.grad(lambda lhs: dense_matmul(lhs, rhs).sum())(lhs)

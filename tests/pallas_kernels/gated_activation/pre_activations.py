"""Pre-activations, kind ones and cruel ones, and what is expected of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import gated_halves
from pallas_kernels.columns import padded_rows
from pallas_kernels.quantize import QTensor, quantize
from tests.helpers import float64

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")
CRUEL = ("nan", "infinity", "minus infinity", "infinite up", "zeros", "large", "tiny", "at the limit")


def random(rng, shape, dtype) -> jax.Array:
    """Numbers of very different sizes, of which the activations make large and small ones."""
    sizes = np.exp(rng.standard_normal((*shape[:-1], 1)))
    return jnp.asarray((0.5 if dtype == "float16" else 2) * rng.standard_normal(shape) * sizes, dtype)


def cruel(rng, case: str, rows: int, columns: int, dtype) -> jax.Array:
    """Pre-activations [rows, 2 columns], of which row 3 is what `case` says; 7 is the limit."""
    h = np.asarray(random(rng, (rows, 2 * columns), dtype)).copy()
    gate, up = h[3, :columns], h[3, columns:]
    if case == "nan":
        gate[5], up[columns - 3] = np.nan, np.nan
    elif case in ("infinity", "minus infinity"):
        gate[5] = np.inf if case == "infinity" else -np.inf
    elif case == "infinite up":
        up[5] = np.inf
    elif case == "zeros":
        gate[...], up[...] = 0, 0
    elif case == "large":
        h[3] *= 100
        gate[0], up[0] = 1, 1  # all others may be past the limit, or where only cancellation leaves a gradient
    elif case == "tiny":
        h[3] *= 1e-12 if dtype != "float16" else 1e-4
    else:
        assert case == "at the limit"
        h[3] = np.where(rng.integers(2, size=2 * columns), 7, -7)
    return jnp.asarray(h)


@functools.partial(jax.jit, static_argnums=(2, 3))
def by_jax(h: jax.Array, dout: jax.Array, activation: Any, limit: float | None) -> tuple[jax.Array, jax.Array]:
    """The activation in float32, and what `jax.vjp` gives."""
    value, pull = jax.vjp(functools.partial(gated_halves, activation=activation, limit=limit), h.astype(jnp.float32))
    return value, pull(dout.astype(jnp.float32))[0]


def widened(rounded: Any) -> np.ndarray:
    """The values of a QTensor [R, C] with scales of 1x128, in float64."""
    return float64(rounded.values) * np.repeat(float64(rounded.scale), 128, axis=1)


def largest_error_of_a_row(out: Any, ref: Any) -> float:
    """‖out − ref‖ / ‖ref‖ of the finite numbers of a row; infinite where other numbers are finite than of `ref`."""
    out, ref = float64(out), float64(ref)
    finite = np.isfinite(ref)
    if not np.array_equal(np.isfinite(out), finite):
        return np.inf
    out, ref = np.where(finite, out, 0), np.where(finite, ref, 0)
    error, size = (np.linalg.norm(x, axis=1) for x in (out - ref, ref))
    return float((error / np.where(error == 0, 1, size)).max())


def other_numbers(rounded: Any, expected: Any) -> float:
    """The share of the 8-bit values that are others than expected, which now and then a tie can make of a last bit.

    Of values far below the largest of their scale, on which cancellation leaves its mark, nothing is asked.
    """
    ours, theirs = float64(rounded.values), float64(expected.values)
    return float(((ours != theirs) & (np.abs(theirs) > 1e-3 * float(jnp.finfo(expected.dtype).max))).mean())


def in_blocks(x: Any, sizes: Any) -> np.ndarray:
    """Rows [R, F] as `Columns` of their groups hold them: blocks [B, 128, F] in use, filled up with zeros."""
    blocks, begin = [np.zeros((0, 128, x.shape[1]))], 0
    for size in sizes:
        rows = float64(x)[begin : begin + size]
        blocks.append(np.pad(rows, ((0, -size % 128), (0, 0))).reshape(-1, 128, x.shape[1]))
        begin += size
    return np.concatenate(blocks)


def assert_columns(columns: Any, exact: Any, sizes: Any) -> None:
    """That they are the rows of `exact` in blocks, each feature of a block rounded as `quantize` rounds it."""
    blocks = in_blocks(exact, sizes)
    rounded = quantize(jnp.asarray(blocks, jnp.float32), columns.dtype, scaling="128x1")
    assert columns.values.shape == (exact.shape[1], padded_rows(exact.shape[0], len(sizes)))
    assert columns.scale.shape == (columns.values.shape[1] // 128, exact.shape[1])
    if not (used := len(blocks)):
        return
    # A block of few rows may have nothing but numbers that cancel to almost zero.
    np.testing.assert_allclose(columns.scale[:used], rounded.scale[:, 0], rtol=1e-5, atol=1e-7 * rounded.scale.max())
    values = columns.values[:, : used * 128].T.reshape(blocks.shape)
    assert other_numbers(QTensor(values, columns.scale), rounded) < 2e-3
    np.testing.assert_array_equal(float64(values)[blocks == 0], 0)

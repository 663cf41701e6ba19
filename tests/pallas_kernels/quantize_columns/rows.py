"""Rows of groups to round, and what they are rounded to: placed with numpy, block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.columns import BLOCK, Columns, padded_rows
from pallas_kernels.quantize import quantize
from tests.helpers import float64, same_bits

SIZES = {
    "ragged": (0, 130, 1, 0, 128, 127, 0),
    "one group has all": (0, 0, 300, 0),
    "one group": (257,),
    "no rows": (0, 0, 0),
}
"""Rows of the groups; there are always a few more, which no group owns."""

UNOWNED = 14


def random(rng, shape, dtype):
    """Numbers of very different sizes."""
    sizes = np.exp(rng.standard_normal((shape[0], 1)) + rng.standard_normal((1, shape[1])))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def random_ids(rng, num_rows: int, num_tokens: int):
    """Tokens of rows; some are repeated, and some rows have none."""
    return jnp.asarray(rng.integers(-3, num_tokens + 3, size=num_rows), jnp.int32)


def expected(x, sizes, row_ids=None, dtype="float8_e4m3fn") -> Columns:
    """The blocks that there are, of rows that are copied one by one."""
    x = np.asarray(x)
    num_rows = len(x) if row_ids is None else len(row_ids)
    padded, block, row = np.zeros((padded_rows(num_rows, len(sizes)), x.shape[1]), x.dtype), 0, 0
    for size in sizes:
        for i in range(size):
            source = row + i if row_ids is None else int(row_ids[row + i])
            if 0 <= source < len(x):
                padded[block * BLOCK + i] = x[source]
        block, row = block - -size // BLOCK, row + size
    # Jitted, as XLA divides in another way where it compiles operations one by one.
    rounded = jax.jit(functools.partial(quantize, dtype=dtype, scaling=f"{BLOCK}x1"))(jnp.asarray(padded))
    return first(Columns(rounded.values.T, rounded.scale), block)


def first(columns: Columns, blocks: int) -> Columns:
    """The first blocks alone: what is behind them may be anything."""
    return Columns(columns.values[:, : blocks * BLOCK], columns.scale[:blocks])


def assert_equal(got: Columns, wanted: Columns) -> None:
    """The same bits in the blocks that there are; but where a scale is NaN the values mean nothing."""
    got = first(got, len(wanted.scale))
    np.testing.assert_array_equal(float64(got.scale), float64(wanted.scale))
    is_finite = np.repeat(np.isfinite(np.asarray(wanted.scale)), BLOCK, axis=0).T
    ours, theirs = (np.where(is_finite, np.asarray(columns.values).view(np.uint8), 0) for columns in (got, wanted))
    assert same_bits(ours, theirs)
    assert got.dtype == wanted.dtype

"""Rows to round, kind ones and cruel ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize import quantize
from tests.helpers import float64

CRUEL = ("nan", "minus nan", "infinity", "minus infinity", "zeros", "minus zeros", "subnormal", "huge", "ties")


def random(rng, shape, dtype):
    """Numbers of very different sizes."""
    sizes = np.exp(rng.standard_normal((*shape[:-1], 1)) + rng.standard_normal(shape[-1]))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def cruel(rng, case, dtype):
    """[9, 256] of which the second block of row 4 is what `case` says."""
    x = np.asarray(random(rng, (9, 256), dtype)).copy()
    info, block, place = jnp.finfo(dtype), x[4, 128:], rng.integers(128)
    values = {"nan": np.nan, "minus nan": -np.nan, "infinity": np.inf, "minus infinity": -np.inf}
    if case in values:
        block[place] = values[case]
    elif case.endswith("zeros"):
        block[...] = -0.0 if case.startswith("minus") else 0
    elif case == "subnormal":
        block[...] = np.asarray(rng.integers(-5, 6, size=128) * float(info.smallest_subnormal), x.dtype)
    elif case == "huge":
        block[...] = np.asarray(rng.uniform(-1, 1, size=128) * float(info.max), x.dtype)
        block[place] = info.max
    elif case == "ties":  # a scale of one, and numbers that lie between two that the 8 bits have
        block[...] = np.asarray(rng.integers(-64, 64, size=128) * 0.25 + 16.5, x.dtype)
        block[place] = 448
    return jnp.asarray(x)


def expected(x, dtype):
    """Jitted, as XLA divides in another way where it compiles operations one by one."""
    return jax.jit(functools.partial(quantize, dtype=dtype, scaling="1x128"))(x)


def assert_equal(got, x, dtype):
    """That it is what `quantize` makes of x, bit by bit; the sign of a NaN is left open."""
    reference = expected(x, dtype)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = float64(ours), float64(theirs)
        np.testing.assert_array_equal(ours, theirs)
        there = ~np.isnan(theirs)
        np.testing.assert_array_equal(np.signbit(ours)[there], np.signbit(theirs)[there])

"""Weights to round, kind ones and cruel ones."""

import jax.numpy as jnp
import numpy as np

CRUEL = ("nan", "infinity", "minus infinity", "zeros", "minus zeros", "subnormal", "huge", "ties", "one value")


def random(rng, shape, dtype):
    """Numbers of very different sizes."""
    sizes = np.exp(rng.standard_normal((*shape[:-1], 1)) + rng.standard_normal((*shape[:-2], 1, shape[-1])))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def cruel(rng, case, dtype):
    """[2, 256, 384] of which block [1, 0, 1] is what `case` says."""
    weights = np.asarray(random(rng, (2, 256, 384), dtype)).copy()
    info = jnp.finfo(dtype)
    block = weights[1, :128, 128:256]
    place = tuple(rng.integers(128, size=2))
    if case == "nan":
        block[place] = np.nan
    elif case == "infinity":
        block[place] = np.inf
    elif case == "minus infinity":
        block[place] = -np.inf
    elif case == "zeros":
        block[...] = 0
    elif case == "minus zeros":
        block[...] = -0.0
    elif case == "subnormal":
        block[...] = np.asarray(rng.integers(-5, 6, size=(128, 128)) * float(info.smallest_subnormal), block.dtype)
    elif case == "huge":
        block[...] = np.asarray(rng.uniform(-1, 1, size=(128, 128)) * float(info.max), block.dtype)
        block[place] = info.max
    elif case == "ties":  # a scale of one, and numbers that lie between two that the 8 bits have
        block[...] = np.asarray(rng.integers(-64, 64, size=(128, 128)) * 0.25 + 16.5, block.dtype)
        block[place] = 448
    elif case == "one value":
        block[...] = np.asarray(rng.standard_normal(), block.dtype)
    return jnp.asarray(weights)

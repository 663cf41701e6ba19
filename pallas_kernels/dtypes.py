"""The dtypes of tokens, of parameters and of what is made of them, where they are not in 8 bits."""

import jax
import jax.numpy as jnp

FLOATS = ("bfloat16", "float16", "float32")
"""Their names."""


def is_float(dtype: jax.typing.DTypeLike) -> bool:
    """Whether `dtype` is one of `FLOATS`."""
    return jnp.dtype(dtype).name in FLOATS

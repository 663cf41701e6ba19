"""Weights rounded to 8 bits in both layouts, in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import QTensor, quantize

SCALING = "128x128"
"""How weights are scaled: a block and its transpose have one scale."""


def quantize_transpose(
    weights: jax.Array, *, dtype: jnp.dtype, k_major: bool, n_last: bool
) -> tuple[QTensor | None, QTensor | None]:
    """What `quantize` makes of them, and the same transposed.

    Args:
      weights: [G, K, N].
      dtype: of 8 bits.
      k_major: whether to give [G, N, K].
      n_last: whether to give [G, K, N].

    Returns:
      [G, N, K] and [G, K, N], None for what is not asked for.
    """
    rounded = quantize(weights, dtype, scaling=SCALING)
    return rounded.mT if k_major else None, rounded if n_last else None

"""Top-k: which K of E scores are the largest, for each token.

scores [T, E] -> ids [T, K], best first; among equal scores the lower number wins.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import run


def top_k_ids(scores: jax.Array, k: int, *, backend: str = "auto") -> jax.Array:
    """The places of the `k` largest scores of each row. Takes no gradient.

    Args:
      scores: float32 [T, E].
      k: 1 … E.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      int32 [T, K]. A row that holds NaN gets valid places, which ones is not said.

    Raises:
      ValueError: `scores` is not a floating-point matrix, or `k` is out of range.
    """
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be a floating-point matrix [T, E], got {scores.dtype}{list(scores.shape)}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be 1 to E = {scores.shape[1]}, got {k}")
    return run("top_k", "top_k_ids", backend, jax.lax.stop_gradient(scores), k)


__all__ = ["top_k_ids"]

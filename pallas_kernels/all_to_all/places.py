"""Where rows lie that are sorted by the expert that they are for, then by the chip that sends them."""

import jax
import jax.numpy as jnp

from pallas_kernels.tracing.running_sums import running_sums


def first_places(counts: jax.Array, num_local: int) -> jax.Array:
    """Counts [ep, E] -> int32 [ep, E]: the place of a chip's first row for an expert among all rows of its chip.

    Args:
      counts: int32, rows of each chip for each expert.
      num_local: experts of a chip.
    """
    before_sender = running_sums(counts) - counts
    by_rank = counts.sum(0).reshape(-1, num_local)
    before_expert = (running_sums(by_rank, axis=1) - by_rank).reshape(-1)
    return (before_expert + before_sender).astype(jnp.int32)

"""Counting sort: where each of N keys goes when equal keys are brought together, and how often each occurs.

    keys   [2, 0, 0, 2, 2, 1]     three groups
    rows   [3, 0, 1, 4, 5, 2]     key -> row
    order  [1, 2, 5, 0, 3, 4]     row -> key
    sizes  [2, 1, 3]

The sort is stable. A key outside [0, G) has no row (−1); the rows that remain lie at the end and have no key (−1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.plan.ids import as_ids
from pallas_kernels.primitive import Operator

_counting_sort = Operator("plan", "counting_sort")


class Sorted(NamedTuple):
    """The result, all int32.

    Attributes:
      rows: [N], the row of each key.
      order: [N], the key of each row.
      group_sizes: [G], how often each of the G keys occurs.
    """

    rows: jax.Array
    order: jax.Array
    group_sizes: jax.Array


def counting_sort(keys: jax.Array, num_groups: int, *, backend: str = "auto") -> Sorted:
    """Sorts `keys`.

    Args:
      keys: integer [N].
      num_groups: G.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      Sorted. Equal inputs give equal results, bit for bit.

    Raises:
      ValueError: `keys` is not an integer vector, or `num_groups` is not positive.
    """
    if keys.ndim != 1 or not jnp.issubdtype(keys.dtype, jnp.integer):
        raise ValueError(f"keys must be an integer vector [N], got {keys.dtype}{list(keys.shape)}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    keys = keys if keys.dtype == jnp.int32 else as_ids(keys, num_groups)
    return Sorted(*_counting_sort(backend, keys=keys, num_groups=num_groups))

"""Counting sort on NVIDIA GPUs, by comparing 64 keys with 64 others at a time in a warpgroup's registers.

Few keys are all compared with one another, in one kernel (`few`); many are cut into chunks, for two (`many`).

    floor in time = (4·N bytes read + 8·N bytes written) / HBM bandwidth; few keys take as long as a kernel starts
"""

import jax

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.plan import reference
from pallas_kernels.plan.gpu.few import sort_few
from pallas_kernels.plan.gpu.many import MOST_GROUPS, sort_many

_FEW_KEYS = 4096  # that are compared with one another


def counting_sort(keys: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.plan.counting_sort`."""
    require_hopper("counting_sort")
    num_keys = keys.shape[0]
    if num_keys == 0:
        return reference.counting_sort(keys, num_groups)
    if num_groups > MOST_GROUPS:
        raise Unsupported(f"counting_sort: the kernel takes up to {MOST_GROUPS} groups, got {num_groups}")
    sort = sort_few if num_keys <= _FEW_KEYS else sort_many
    rows, order, group_sizes = sort(keys, num_groups)
    return rows[:num_keys], order[:num_keys], group_sizes


__all__ = ["counting_sort"]

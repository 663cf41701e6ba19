"""Group sizes as every backend gets them: not negative, and of no more rows than there are.

A negative size counts as 0, and where the sizes sum to more than M, groups end at row M:

    M = 8, group_sizes = [3, -1, 4, 2**31 - 1, 5] -> [3, 0, 4, 1, 0]
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from pallas_kernels.concrete import is_known, is_symbolic
from pallas_kernels.debug import are_checked

_MOST = np.iinfo(np.int32).max


def within_rows(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """The sizes of groups within M = `num_rows` rows, int32 [E]; see the module's page.

    Inside of `pallas_kernels.debug.debug_checks` sizes that this changes are an error when the program runs.
    """
    if is_known(group_sizes) and not is_symbolic(num_rows):  # and found right when they were checked
        return jnp.asarray(group_sizes, jnp.int32)
    if group_sizes.dtype.itemsize >= 4:
        group_sizes = jnp.minimum(group_sizes, _MOST)  # unsigned and wide ones may not fit int32
    group_sizes = group_sizes.astype(jnp.int32)
    rows = jnp.asarray(num_rows, jnp.int32)
    sizes = jnp.clip(group_sizes, 0, rows)
    # Neither addend is more than 2³¹ − 1, so the first sum past M has not wrapped round; what follows is past it too.
    sums = jnp.cumsum(sizes, dtype=jnp.uint32)
    is_past = sums > rows.astype(jnp.uint32)
    if not _fits(group_sizes.shape[0], num_rows):
        is_past = lax.cummax(is_past.astype(jnp.int32)) > 0
    if are_checked():
        _check(group_sizes, is_past, rows)
    ends = jnp.where(is_past, rows, sums.astype(jnp.int32))
    return jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))


def _fits(num_groups: int, num_rows: int) -> bool:
    """Whether as many groups of M rows each do not overflow 32 bits; False if the sizes are symbols."""
    return not is_symbolic(num_groups, num_rows) and num_groups * num_rows < 1 << 32


def _check(group_sizes: jax.Array, is_past: jax.Array, rows: jax.Array) -> None:
    is_wrong = (group_sizes < 0) | (group_sizes > rows) | is_past
    group = jnp.argmax(is_wrong)
    checkify.check(
        jnp.logical_not(is_wrong.any()),
        "group_sizes[{group}] = {size}: sizes must be at least 0 and sum to at most M = {rows}, the rows of lhs",
        group=group,
        size=group_sizes[group],
        rows=rows,
    )

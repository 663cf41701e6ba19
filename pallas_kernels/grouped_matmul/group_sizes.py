"""Group sizes as every backend reads them: a negative one is 0, and groups end at row M, whatever they claim.

    M = 8, group_sizes = [3, -1, 4, 2**31 - 1, 5] -> rows [0, 3), [3, 3), [3, 7), [7, 8), [8, 8)

Kernels that go through the sizes one by one anyway do that as they go; the others ask `bounds`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from pallas_kernels.debug import are_checked
from pallas_kernels.tracing.concrete import is_known, is_symbolic
from pallas_kernels.tracing.running_sums import running_sums

_MOST = np.iinfo(np.int32).max


def as_group_sizes(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """The sizes of groups of M = `num_rows` rows as operators take them, int32 [E]; what is too large stays too large.

    Inside of `pallas_kernels.debug.debug_checks` sizes that are negative or too large are an error when the program
    runs.
    """
    if is_known(group_sizes) and not is_symbolic(num_rows):  # `check_operands` has looked at their values
        return jnp.asarray(group_sizes, jnp.int32)
    if group_sizes.dtype == jnp.int64:
        group_sizes = jnp.clip(group_sizes, -1, _MOST)
    elif group_sizes.dtype in (jnp.uint32, jnp.uint64):
        group_sizes = jnp.minimum(group_sizes, _MOST)
    group_sizes = group_sizes.astype(jnp.int32)
    if are_checked():
        _check(group_sizes, num_rows)
    return group_sizes


def bounds(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The first row of each group, and the row after its last, int32 [E] both; see the module's page.

    Args:
      group_sizes: int32 [E], of any values.
      num_rows: M.
    """
    sums, is_past = _sums(group_sizes, num_rows)
    ends = jnp.where(is_past, jnp.asarray(num_rows, jnp.int32), sums.astype(jnp.int32))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def _sums(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The running sums of the sizes, uint32 [E], and where they exceed M; past that point they may have overflowed."""
    rows = jnp.asarray(num_rows, jnp.int32)
    # Neither addend is more than 2³¹ − 1, so the first sum past M has not wrapped round; what follows is past it too.
    sums = running_sums(jnp.clip(group_sizes, 0, rows), dtype=jnp.uint32)
    is_past = sums > rows.astype(jnp.uint32)
    if not _fits(group_sizes.shape[0], num_rows):
        is_past = lax.cummax(is_past.astype(jnp.int32)) > 0
    return sums, is_past


def _fits(num_groups: int, num_rows: int) -> bool:
    """Whether as many groups of M rows each do not overflow 32 bits; False if the sizes are symbols."""
    return not is_symbolic(num_groups, num_rows) and num_groups * num_rows < 1 << 32


def _check(group_sizes: jax.Array, num_rows: int) -> None:
    _, is_past = _sums(group_sizes, num_rows)
    is_wrong = (group_sizes < 0) | (group_sizes > num_rows) | is_past
    group = jnp.argmax(is_wrong)
    checkify.check(
        jnp.logical_not(is_wrong.any()),
        "group_sizes[{group}] = {size}: sizes must be at least 0 and sum to at most M = {rows}, the rows of lhs",
        group=group,
        size=group_sizes[group],
        rows=jnp.asarray(num_rows, jnp.int32),
    )

"""The order in which a gradient of weights visits blocks of rows, where a group without rows is visited once too."""

import jax
import jax.numpy as jnp


def visits_of(first: jax.Array, visits: jax.Array, num_blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which group and which block each visit is of.

    Args:
      first: int32 [G], the block that each group is visited for first.
      visits: int32 [G], how many each has, one at least.
      num_blocks: that there are; V = `num_blocks` + G visits are enough.

    Returns:
      group: int32 [V + 2]: entry v + 1 is the group of visit v, those before the first and after the last are -1.
      block: int32 [V].
      count: int32, visits in use.
    """
    num_groups, last = first.shape[0], jnp.cumsum(visits, dtype=jnp.int32)
    number = jnp.arange(num_blocks + num_groups, dtype=jnp.int32)
    group = jnp.searchsorted(last, number, side="right", method="compare_all").astype(jnp.int32)
    known = jnp.minimum(group, num_groups - 1)
    block = jnp.minimum(first[known] + number - (last - visits)[known], num_blocks - 1)
    edge = jnp.full(1, -1, jnp.int32)
    return jnp.concatenate([edge, jnp.where(group < num_groups, group, -1), edge]), block, last[-1]

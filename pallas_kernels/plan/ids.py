"""Ids of groups, of whatever integer type they come in.

as_ids([0, 200, 255], 256)     uint8    -> [0, 200, 255]     255 is a group, not −1
as_ids([0, 200, 255], 200)     uint8    -> [0, −1, −1]
as_ids([0, −1, 2³² + 3], 8)    int64    -> [0, −1, −1]       not group 3
"""

import jax
import jax.numpy as jnp


def as_ids(ids: jax.Array, num_groups: int) -> jax.Array:
    """Ids as int32, with −1, which unsigned types do not have, for every one outside [0, num_groups).

    To be called where ids enter: comparisons with −1, and with bounds that a narrow type cannot hold, go wrong before.

    Args:
      ids: integers of any type and shape.
      num_groups: G.

    Returns:
      int32, of the shape of `ids`.

    Raises:
      ValueError: `ids` are not integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}{list(ids.shape)}")
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)  # which holds them all, and the bound
    is_valid = (ids >= 0) & (ids < num_groups)
    return jnp.where(is_valid, jnp.where(is_valid, ids, 0).astype(jnp.int32), -1)


def in_int32(ids: jax.Array, num_groups: int) -> jax.Array:
    """`as_ids` where the type needs it: int32 ids stay as they are, since a plan leaves out what is no group."""
    return ids if ids.dtype == jnp.int32 else as_ids(ids, num_groups)

"""Names by which policies of `jax.checkpoint` know what a function makes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def named[Tree: Any](tree: Tree, name: str) -> Tree:
    """`tree`, every array of which is known to policies by `name`.

    What `jax.checkpoint` keeps it rounds to its own precision, for which it takes e4m3fn for a format with infinities:
    its numbers from 256 on would become NaN. So 8-bit floats are kept as bits.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.dtype.itemsize > 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return checkpoint_name(leaf, name)
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint8)
        return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), leaf.dtype)

    return jax.tree.map(one, tree)

"""Gathering rows by a plan in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor


def dispatch[Rows: jax.Array | QTensor](x: Rows, plan: Plan) -> Rows:
    """See `pallas_kernels.dispatch.dispatch`."""
    in_use = plan.order >= 0
    token = jnp.maximum(plan.order, 0) // plan.inverse.shape[1]

    def gather(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] == 0:  # no tokens, yet rows when the plan has a capacity
            return jnp.zeros((token.shape[0], leaf.shape[1]), leaf.dtype)
        return jnp.where(in_use[:, None], leaf[token], jnp.zeros((), leaf.dtype))

    return jax.tree.map(gather, x)

"""Weighted sums of rows by a plan in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan


def combine(
    rows: jax.Array,
    plan: Plan,
    weights: jax.Array,
    residual: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `pallas_kernels.combine.combine`."""
    total = jnp.zeros((plan.inverse.shape[0], rows.shape[1]), jnp.float32)
    for k in range(plan.inverse.shape[1]):
        weight = jnp.where(plan.inverse[:, k] >= 0, weights[:, k], 0).astype(jnp.float32)
        total += weight[:, None] * _choice(rows, plan, k)
    if residual is not None:
        total += residual.astype(jnp.float32)
    return total.astype(out_dtype)


combine_onto = combine
"""`combine` with a residual."""


def combine_dweights(rows: jax.Array, plan: Plan, dout: jax.Array) -> jax.Array:
    """The gradient of `combine` for its weights: ⟨dout[t], rows[inverse[t, k]]⟩, float32 [T, K]."""
    dout = dout.astype(jnp.float32)
    return jnp.stack(
        [(dout * _choice(rows, plan, k)).sum(1) for k in range(plan.inverse.shape[1])],
        axis=1,
    )


def _choice(rows: jax.Array, plan: Plan, k: int) -> jax.Array:
    """The row of each token's k-th assignment, [T, H] in float32; zeros where it has none."""
    row = plan.inverse[:, k]
    if rows.shape[0] == 0:
        return jnp.zeros((row.shape[0], rows.shape[1]), jnp.float32)
    return jnp.where((row >= 0)[:, None], rows[jnp.maximum(row, 0)].astype(jnp.float32), 0)

"""Combine: the weighted sum of what the experts made of each token.

rows [R, H], weights [T, K] -> [T, H]      out[t] = Σ_k weights[t, k] · rows[plan.inverse[t, k]] (+ residual[t])
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dtypes import is_float
from pallas_kernels.moved_rows import combined, onto
from pallas_kernels.plan import Plan


def combine(
    rows: jax.Array,
    plan: Plan,
    weights: jax.Array | None = None,
    *,
    residual: jax.Array | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Sums each token's rows, weighted, in float32 and in the order of k.

    Args:
      rows: [R, H], BF16, FP16 or float32, in the order of `plan`.
      plan: made from topk_ids [T, K].
      weights: [T, K] floating point; None for ones (with K = 1 this undoes `dispatch`).
      residual: [T, H], BF16, FP16 or float32, what the sum is added to before it is rounded; None for nothing.
      preferred_element_type: dtype of the result; default is that of `rows`.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [T, H]. An assignment without a row adds nothing, whatever its weight, and rows without
      an assignment are never read as data.

    Raises:
      ValueError: shapes do not fit the plan, or `rows` or `residual` are narrower than 16 bits.
    """
    if rows.ndim != 2 or rows.shape[0] != plan.order.shape[0]:
        raise ValueError(
            f"rows must have shape [R, H] with the plan's R = {plan.order.shape[0]}, got {list(rows.shape)}"
        )
    if not is_float(rows.dtype):
        raise ValueError(f"rows must be BF16, FP16 or float32 (a sum below BF16 loses too much), got {rows.dtype}")
    if weights is None:
        weights = jnp.ones(plan.inverse.shape, jnp.float32)
    if weights.shape != plan.inverse.shape:
        raise ValueError(
            f"weights must have the plan's shape [T, K] = {list(plan.inverse.shape)}, got {list(weights.shape)}"
        )
    out_dtype = rows.dtype if preferred_element_type is None else jnp.dtype(preferred_element_type)
    operands = {"rows": rows, "plan": plan, "weights": weights, "out_dtype": out_dtype}
    if residual is None:
        return combined(backend, **operands)
    shape = plan.inverse.shape[0], rows.shape[1]
    if residual.shape != shape or not is_float(residual.dtype):
        raise ValueError(
            f"residual must be BF16, FP16 or float32 [T, H] = {list(shape)}, got {residual.dtype}{list(residual.shape)}"
        )
    return onto(backend, residual=residual, **operands)


__all__ = ["combine"]

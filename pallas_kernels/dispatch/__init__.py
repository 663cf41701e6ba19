"""Dispatch: the row of each token copied to every place where an expert will read it.

x [T, H], plan of [T, K] assignments into R rows -> [R, H]      row r = x[plan.order[r] // K]
"""

import jax

from pallas_kernels.moved_rows import dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor, Rounded, Rows, check_row_scales


def dispatch[Kind: Rows](x: Kind, plan: Plan, *, backend: str = "auto") -> Kind:
    """Gathers token rows into the order of `plan`.

    Args:
      x: [T, H], an array, or a QTensor whose every row has its own scales (as "1x128" and "per_row" give): values
        and scales then travel together; or a `Rounded`.
      plan: made from topk_ids [T, K].
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [R, H] of the kind of `x`. Rows without an assignment are zeros (so are their scales). The gradient of an array
      sums each token's rows in float32, in the order of k; a QTensor takes none.

    Raises:
      ValueError: `x` has not one row for each token of the plan, or scales shared between rows.
    """
    if isinstance(x, Rounded):
        array, in_8_bits = dispatch(x.array, plan, backend=backend), dispatch(x.in_8_bits, plan, backend=backend)
        return Rounded(array, in_8_bits)  # type: ignore[return-value]
    num_tokens = plan.inverse.shape[0]
    if x.ndim != 2 or x.shape[0] != num_tokens:
        raise ValueError(f"x must have shape [T, H] with the plan's T = {num_tokens} tokens, got {list(x.shape)}")
    if isinstance(x, QTensor):
        check_row_scales("x", x)
        x = jax.lax.stop_gradient(x)
    return dispatched(backend, x=x, plan=plan)


__all__ = ["dispatch"]

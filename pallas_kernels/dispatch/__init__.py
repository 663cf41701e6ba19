"""Dispatch: the row of each token copied to every place where an expert will read it.

x [T, H], plan of [T, K] assignments into R rows -> [R, H]      row r = x[plan.order[r] // K]
"""

from typing import Any, overload

import jax
import jax.numpy as jnp

from pallas_kernels.moved_rows import dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import Copied, QTensor, Rounded, Rows, ToRound, check_row_scales


@overload
def dispatch[Kind: Rows](x: Kind, plan: Plan, *, backend: str = "auto") -> Kind: ...


@overload
def dispatch(x: ToRound, plan: Plan, *, backend: str = "auto") -> QTensor: ...


def dispatch(x: Copied, plan: Plan, *, backend: str = "auto") -> Rows:
    """Gathers token rows into the order of `plan`.

    Args:
      x: [T, H], an array, or a QTensor whose every row has its own scales (as "1x128" and "per_row" give): values
        and scales then travel together; or a `Rounded`; or a `ToRound`.
      plan: made from topk_ids [T, K].
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [R, H] of the kind of `x`, a QTensor of a `ToRound`. Rows without an assignment are zeros (so are their scales).
      The gradient of an array sums each token's rows in float32, in the order of k; 8 bits take none.

    Raises:
      ValueError: `x` has not one row for each token of the plan, or scales shared between rows.
    """
    if isinstance(x, Rounded):
        array, in_8_bits = dispatch(x.array, plan, backend=backend), dispatch(x.in_8_bits, plan, backend=backend)
        return Rounded(array, in_8_bits)
    num_tokens = plan.inverse.shape[0]
    if x.ndim != 2 or x.shape[0] != num_tokens:
        raise ValueError(f"x must have shape [T, H] with the plan's T = {num_tokens} tokens, got {list(x.shape)}")
    if isinstance(x, ToRound):
        array = jax.lax.stop_gradient(x.array)
        return dispatched_rounded(backend, x=array, plan=plan, dtype=jnp.dtype(x.qdtype))
    if isinstance(x, QTensor):
        check_row_scales("x", x)
        x = jax.lax.stop_gradient(x)
    return dispatched(backend, x=x, plan=plan)


def _rounded_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError("dispatch() of a ToRound cannot be differentiated: 8-bit cotangents lose the gradient")


dispatched_rounded = Operator("dispatch", "dispatch_rounded", jvp=_rounded_jvp)
"""`dispatch` of a `ToRound` as a primitive."""

__all__ = ["dispatch"]

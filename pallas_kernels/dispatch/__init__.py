"""Dispatch: the row of each token copied to every place where an expert will read it.

x [T, H], plan of [T, K] assignments into R rows -> [R, H]      row r = x[plan.order[r] // K]
"""

from typing import Any, overload

import jax
import jax.numpy as jnp

from pallas_kernels.moved_rows import dispatched
from pallas_kernels.plan import Plan, check_choices, in_int32, make_plan, tight_plan
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import Copied, QTensor, Rounded, Rows, ToRound, check_row_scales
from pallas_kernels.tracing.concrete import is_less

_MOST_ASSIGNMENTS = 1024
"""As many as each block of a kernel may compare with its own."""


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


def plan_and_dispatch(
    x: ToRound, topk_ids: jax.Array, num_groups: int, *, backend: str = "auto"
) -> tuple[Plan, QTensor]:
    """`make_plan`, tight, and `dispatch` by it: of few tokens in one kernel on a GPU.

    Args:
      x: [T, H]. No gradient passes.
      topk_ids: integer [T, K], as `make_plan` takes them.
      num_groups: G.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The plan, and rows [T·K, H], of which those without an assignment are zeros.

    Raises:
      ValueError: `topk_ids` is not an integer matrix with a row for each token, or `num_groups` is not positive.
    """
    check_choices(topk_ids, num_groups)
    if x.ndim != 2 or x.shape[0] != topk_ids.shape[0]:
        raise ValueError(f"x must be [T, H] with the T = {topk_ids.shape[0]} tokens of topk_ids, got {list(x.shape)}")
    if not is_less(topk_ids.size, _MOST_ASSIGNMENTS + 1):
        plan = make_plan(topk_ids, num_groups, backend=backend)
        return plan, dispatch(x, plan, backend=backend)
    by_group, rows = planned_and_dispatched(
        backend,
        x=jax.lax.stop_gradient(x.array),
        topk_ids=in_int32(topk_ids, num_groups),
        num_groups=num_groups,
        dtype=jnp.dtype(x.qdtype),
    )
    return tight_plan(by_group, topk_ids.shape), rows


def _rounded_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError("dispatch() of a ToRound cannot be differentiated: 8-bit cotangents lose the gradient")


dispatched_rounded = Operator("dispatch", "dispatch_rounded", jvp=_rounded_jvp)
"""`dispatch` of a `ToRound` as a primitive."""

planned_and_dispatched = Operator("dispatch", "plan_and_dispatch", jvp=_rounded_jvp)
"""`plan_and_dispatch` as a primitive; the plan as `counting_sort` has it."""

__all__ = ["dispatch", "plan_and_dispatch"]

"""All-to-all of as many rows as there are: every chip puts blocks of its rows where its peers want them.

x [N, H] on every chip, or tokens and the plan that makes N rows of them, n blocks for each of ep chips
    -> [R, H] on every chip, rows that no block fills are anything
"""

import jax
import jax.numpy as jnp

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.all_to_all.routes import Routes
from pallas_kernels.moved_rows import combined
from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import QDtype, QTensor, check_row_scales, dequantize, quantize


def all_to_all[Rows: jax.Array | QTensor](
    x: Rows,
    blocks: Blocks | Routes,
    num_rows: int,
    axes: tuple[str, ...],
    *,
    plan: Plan | None = None,
    cotangents: QDtype | None = None,
    backend: str = "auto",
) -> Rows:
    """Moves blocks of rows between the chips along mesh axes, inside `jax.shard_map`.

    Args:
      x: [N, H], an array, or a QTensor whose every row has its own scales: values and scales then travel together.
      blocks: what goes where, the chips in the order of `axes`: blocks of rows, the same number on every chip, or
        the route of every row, from `make_routes`. TPUs take blocks alone, and XLA carries those best.
      num_rows: R, rows of the result.
      axes: the mesh axes, all of whose chips take part, in the order in which they number the chips.
      plan: with it x are tokens [T, H], and the N rows that travel are those that `dispatch` makes of them by `plan`.
      cotangents: 8-bit dtype in which cotangents travel, with a scale for each row; None for that in which they come.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu". "xla" is `jax.lax.ragged_all_to_all`, and on CPUs, which
        lack it, the same made of other collectives.

    Returns:
      [R, H] of the kind of x. Rows outside the blocks are anything, NaN too, and by a plan those without an
      assignment. The gradient of an array brings the cotangents of the blocks' rows back; rows of x that no block holds
      get anything. With a plan, each token's are summed, in float32 and in the order of k; there every row that the
      plan assigns must be in a block. A QTensor takes none.

    Raises:
      ValueError: `blocks` are not [ep, n] for the chips along `axes`, or `x` has scales shared between rows.
    """
    chips = jax.lax.axis_size(axes)
    if isinstance(blocks, Blocks) and (blocks.send_sizes.ndim != 2 or blocks.send_sizes.shape[0] != chips):
        raise ValueError(f"blocks must be [ep, n] with ep = {chips} chips along {axes}, got {blocks.send_sizes.shape}")
    if isinstance(x, QTensor):
        check_row_scales("x", x)
        x = jax.lax.stop_gradient(x)
    return moved(backend, x=x, blocks=blocks, num_rows=num_rows, axes=axes, plan=plan, cotangents=cotangents)


def make_routes(
    topk_ids: jax.Array, by_expert: Plan, num_rows: int, axes: tuple[str, ...], *, backend: str = "auto"
) -> tuple[Routes, jax.Array]:
    """Tells chips which hold E / ep experts each what rows they get, inside `jax.shard_map`.

    Rows arrive by local expert, then by sender, then in the order of the sender's choices.

    Args:
      topk_ids: int32 [T, K] in [0, E), or −1 for no expert.
      by_expert: their plan by expert, without gaps; choices that have no row in it are sent nowhere.
      num_rows: R, rows that a chip has room for: not less than any is sent.
      axes: as for `all_to_all`.
      backend: as for `all_to_all`.

    Returns:
      The routes of T·K rows, one for each choice, and int32 [E / ep], the rows that arrive for each local expert.
    """
    chips = jax.lax.axis_size(axes)
    if by_expert.group_sizes.size % chips or topk_ids.shape != by_expert.inverse.shape:
        raise ValueError(
            f"by_expert must be the plan of topk_ids {list(topk_ids.shape)} by experts that {chips} chips share "
            f"evenly, got one of {list(by_expert.inverse.shape)} by {by_expert.group_sizes.size}"
        )
    return _routes_made(backend, topk_ids=topk_ids, by_expert=by_expert, num_rows=num_rows, axes=axes)


_routes_made = Operator("all_to_all", "make_routes")


def _transpose(backend: str, cotangent: jax.Array, operands: Operands) -> Operands:
    x, blocks, axes, plan, dtype = (operands[name] for name in ("x", "blocks", "axes", "plan", "cotangents"))
    num_rows = x.aval.shape[0] if plan is None else plan.order.shape[0]
    travels = cotangent if dtype is None else quantize(cotangent, dtype, scaling="per_row")
    back = all_to_all(travels, blocks.back, num_rows, axes, cotangents=dtype, backend=backend)
    back = dequantize(back, cotangent.dtype) if isinstance(back, QTensor) else back
    if plan is not None:
        ones = jnp.ones(plan.inverse.shape, jnp.float32)
        back = combined(backend, rows=back, plan=plan, weights=ones, out_dtype=back.dtype)
    return {"x": back}


moved = Operator("all_to_all", "all_to_all", linear_in=("x",), transpose=_transpose, hidden=frozenset({"cotangents"}))
"""`all_to_all` as a primitive."""

__all__ = ["Blocks", "Routes", "all_to_all", "make_routes"]

"""All-to-all of as many rows as there are: every chip puts blocks of its rows where its peers want them.

x [N, H] on every chip, or tokens and the plan that makes N rows of them, n blocks for each of ep chips
    -> [R, H] on every chip, rows that no block fills are anything
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.all_to_all.routes import Routes
from pallas_kernels.moved_rows import combined
from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import QDtype, QTensor, check_row_scales, moved_in_8_bits


def all_to_all[Rows: jax.Array | QTensor](
    x: Rows,
    blocks: Blocks | Routes,
    num_rows: int,
    axes: tuple[str, ...],
    *,
    plan: Plan | None = None,
    cotangent_dtype: QDtype | None = None,
    backend: str = "auto",
) -> Rows:
    """Moves blocks of rows between the chips along mesh axes, inside `jax.shard_map`.

    Args:
      x: [N, H], an array, or a QTensor whose every row has its own scales: values and scales then travel together.
      blocks: what goes where, the chips in the order of `axes`: `Blocks`, as many on every chip, or `Routes` of single
        rows, from `make_routes`. A TPU's kernel takes only blocks; XLA carries routes by gathering all rows.
      num_rows: R, rows of the result.
      axes: the mesh axes, all of whose chips take part, in the order in which they number the chips.
      plan: with it x are tokens [T, H], and the N rows that travel are those that `dispatch` makes of them by `plan`.
      cotangent_dtype: of 8 bits, in which cotangents travel, with a scale for each row; None for their own.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu". "xla" is `jax.lax.ragged_all_to_all`, and on CPUs, which
        lack it, the same made of other collectives.

    Returns:
      [R, H] of the kind of x. Rows outside the blocks are anything, NaN too, and by a plan those without an
      assignment. The gradient of an array brings the cotangents of the blocks' rows back; rows of x that no block holds
      get anything. With a plan, each token's are summed, in float32 and in the order of k; there every row that the
      plan assigns must be in a block. A QTensor takes none.

    Raises:
      ValueError: `blocks` are not [ep, n] for the chips along `axes`, or routes of other numbers of rows, or `x` has
        scales shared between rows.
    """
    chips = jax.lax.axis_size(axes)
    if isinstance(blocks, Routes):
        known = (x.shape[0] if plan is None else plan.order.shape[0], num_rows)
        if (found := (blocks.targets.shape[0], blocks.addresses.shape[0])) != known:
            raise ValueError(f"routes must be those of {known[0]} rows to {known[1]}, got {found[0]} to {found[1]}")
    if isinstance(blocks, Blocks) and (blocks.send_sizes.ndim != 2 or blocks.send_sizes.shape[0] != chips):
        raise ValueError(f"blocks must be [ep, n] with ep = {chips} chips along {axes}, got {blocks.send_sizes.shape}")
    if isinstance(x, QTensor):
        check_row_scales("x", x)
        x = jax.lax.stop_gradient(x)
    return moved(backend, x=x, blocks=blocks, num_rows=num_rows, axes=axes, plan=plan, cotangent_dtype=cotangent_dtype)


def make_routes(
    topk_ids: jax.Array, by_expert: Plan, num_rows: int, axes: tuple[str, ...], *, backend: str = "auto"
) -> tuple[Routes, jax.Array]:
    """The routes of rows to the chips of their experts, E / ep consecutive ones a chip; inside `jax.shard_map`.

    Rows arrive sorted by local expert, then by sender, then by choice.

    Args:
      topk_ids: int32 [T, K], experts in [0, E), or −1 for a choice that is not made.
      by_expert: the tight plan of `topk_ids` with E groups; choices without a row in it are not sent.
      num_rows: R, the rows that a chip has room for. More must not be sent to any chip; this is not checked.
      axes: as for `all_to_all`.
      backend: "auto", "xla", "pallas_tpu" (which is XLA's) or "pallas_gpu".

    Returns:
      Routes of T·K rows, one for each choice, and int32 [E / ep], the rows that arrive for each local expert.

    Raises:
      ValueError: `by_expert` is not of the shape of `topk_ids`, or ep does not divide E.
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
    x, blocks, axes, plan, dtype = (operands[name] for name in ("x", "blocks", "axes", "plan", "cotangent_dtype"))
    num_rows = x.aval.shape[0] if plan is None else plan.order.shape[0]
    move = functools.partial(_back, backend, num_rows, axes, dtype)
    back = move(cotangent, blocks) if dtype is None else moved_in_8_bits(move, dtype, cotangent, blocks)
    if plan is not None:
        ones = jnp.ones(plan.inverse.shape, jnp.float32)
        back = combined(backend, rows=back, plan=plan, weights=ones, out_dtype=back.dtype)
    return {"x": back}


def _back[Rows: jax.Array | QTensor](
    backend: str, num_rows: int, axes: tuple[str, ...], dtype: QDtype | None, rows: Rows, blocks: Blocks | Routes
) -> Rows:
    """Rows as the blocks brought them, back."""
    return all_to_all(rows, blocks.back, num_rows, axes, cotangent_dtype=dtype, backend=backend)


moved = Operator(
    "all_to_all", "all_to_all", linear_in=("x",), transpose=_transpose, hidden=frozenset({"cotangent_dtype"})
)
"""`all_to_all` as a primitive."""

__all__ = ["Blocks", "Routes", "all_to_all", "make_routes"]

"""All-to-all of as many rows as there are: every chip puts blocks of its rows where its peers want them.

x [N, H] on every chip, n blocks for each of ep chips -> [R, H] on every chip, rows that no block fills are anything
"""

import jax

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import QTensor, check_row_scales


def all_to_all[Rows: jax.Array | QTensor](
    x: Rows, blocks: Blocks, num_rows: int, axes: tuple[str, ...], *, backend: str = "auto"
) -> Rows:
    """Moves blocks of rows between the chips along mesh axes, inside `jax.shard_map`.

    Args:
      x: [N, H], an array, or a QTensor whose every row has its own scales: values and scales then travel together.
      blocks: what goes where; the same number of blocks on every chip, the chips in the order of `axes`.
      num_rows: R, rows of the result.
      axes: the mesh axes, all of whose chips take part, in the order in which they number the chips.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu". "xla" is `jax.lax.ragged_all_to_all`, and on CPUs, which
        lack it, the same made of other collectives.

    Returns:
      [R, H] of the kind of x. Rows outside the blocks are anything, NaN too. The gradient of an array brings the
      cotangents of the blocks' rows back; rows of x that no block holds get anything. A QTensor takes none.

    Raises:
      ValueError: `blocks` are not [ep, n] for the chips along `axes`, or `x` has scales shared between rows.
    """
    chips = jax.lax.axis_size(axes)
    if blocks.send_sizes.ndim != 2 or blocks.send_sizes.shape[0] != chips:
        raise ValueError(f"blocks must be [ep, n] with ep = {chips} chips along {axes}, got {blocks.send_sizes.shape}")
    if isinstance(x, QTensor):
        check_row_scales("x", x)
        x = jax.lax.stop_gradient(x)
    return moved(backend, x=x, blocks=blocks, num_rows=num_rows, axes=axes)


def _transpose(backend: str, cotangent: jax.Array, operands: Operands) -> Operands:
    x, blocks, axes = (operands[name] for name in ("x", "blocks", "axes"))
    return {"x": moved(backend, x=cotangent, blocks=blocks.back, num_rows=x.aval.shape[0], axes=axes)}


moved = Operator("all_to_all", "all_to_all", linear_in=("x",), transpose=_transpose)
"""`all_to_all` as a primitive."""

__all__ = ["Blocks", "all_to_all"]

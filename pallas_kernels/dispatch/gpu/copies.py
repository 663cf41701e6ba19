"""Copying rows by a plan on NVIDIA GPUs, through registers.

Each row of x is read once, in the order of the tokens, and written to every row that the plan gives it. A second kind
of block looks through `order` for rows without an assignment and writes zeros there.

    floor in time = (bytes of x + bytes of the result) / HBM bandwidth

Gathering in the order of the result instead would read x once for each choice: a token's rows lie too far apart for
the cache.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.dispatch import reference
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.on_gpu.strips import Strips, cut, for_each, launch
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor
from pallas_kernels.tracing.concrete import is_less

_ROWS_AT_ONCE = 8

_FEW_ROWS = 8192
"""Whose scales are read in no time."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      blocks: most blocks that copy rows.
      zero_blocks: most blocks that look for rows without an assignment.
      vectors: most 16-byte vectors of a row that a thread holds.
    """

    blocks: int
    zero_blocks: int
    vectors: int


def dispatch(x: jax.Array | QTensor, plan: Plan) -> jax.Array | QTensor:
    """See `pallas_kernels.dispatch.dispatch`. The scales of a QTensor, a few numbers a row, are left to XLA."""
    require_hopper("dispatch")
    if isinstance(x, QTensor):
        return QTensor(dispatch_rows(x.values, plan), _scales(x.scale, plan))
    return dispatch_rows(x, plan)


def dispatch_weighted(x: jax.Array, plan: Plan, weights: jax.Array, *, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `pallas_kernels.dispatch.reference.dispatch_weighted`."""
    require_hopper("dispatch")
    if x.dtype != jnp.dtype(out_dtype) or weights.size == 0:
        return reference.dispatch_weighted(x, plan, weights, out_dtype=out_dtype)
    return dispatch_rows(x, plan, weights)


def dispatch_rows(
    x: jax.Array, plan: Plan, weights: jax.Array | None = None, *, config: Config | None = None
) -> jax.Array:
    """The kernel: x [T, H] -> [R, H].

    Args:
      x: [T, H] of any dtype of 1, 2 or 4 bytes.
      plan: made from topk_ids [T, K].
      weights: [T, K], by which the rows are multiplied in float32; None copies them bit by bit.
      config: for tuning.
    """
    num_tokens, columns = x.shape
    num_rows = plan.order.shape[0]
    config = config or _config(num_tokens)
    strips = cut("dispatch", columns, x.dtype, config.vectors)
    if plan.inverse.size == 0 or num_rows == 0:
        return reference.dispatch(x, plan)
    units = num_tokens * strips.count
    batches = pl.cdiv(num_rows, _ROWS_AT_ONCE)
    blocks, zero_blocks = min(config.blocks, units), min(config.zero_blocks, batches)

    def body(x_ref, inverse, order, *rest):
        *weights_ref, out = rest  # a list of one, or of none
        block = lax.axis_index("block")

        @pl.when(block < zero_blocks)
        def _():
            _write_zeros(block, zero_blocks, batches, strips, order, out)

        @pl.when(block >= zero_blocks)
        def _():
            _copy_rows(block - zero_blocks, blocks, units, strips, x_ref, inverse, weights_ref, out)

    out = jax.ShapeDtypeStruct((num_rows, strips.vectors, strips.vector), x.dtype)
    inputs = [strips.view(x), plan.inverse, plan.order]
    if weights is not None:
        inputs.append(weights.astype(jnp.float32))
    rows = launch(body, out, *inputs, name="dispatch", blocks=blocks + zero_blocks)
    return rows.reshape(num_rows, columns)


def _scales(scale: jax.Array, plan: Plan) -> jax.Array:
    """The scales of the rows, gathered by XLA.

    Products want them [blocks, R]. Of many rows they are asked for as [R, blocks] in memory too: then XLA reads the
    scales of a row together, and turns them in shared memory. Else each scale that it writes costs it 32 bytes to read.
    """
    rows = reference.dispatch(scale, plan)
    if scale.shape[1] == 1 or not is_less(_FEW_ROWS, rows.shape[0]):
        return rows
    return with_layout_constraint(rows, Layout(major_to_minor=(0, 1)))


def _copy_rows(block, blocks: int, units: int, strips: Strips, x, inverse, weights: Sequence[Any], out) -> None:
    def rows_of(unit):
        token = lax.div(unit, jnp.int32(strips.count))
        return [(inverse[token, k], *(each[token, k] for each in weights)) for k in range(inverse.shape[1])]

    def copy(unit, rows):
        token, strip = lax.div(unit, jnp.int32(strips.count)), lax.rem(unit, jnp.int32(strips.count))
        value = strips.load(x, token, strip)
        for row, *weight in rows:

            @pl.when(row >= 0)
            def _(row=row, weight=weight):
                weighed = (value.astype(jnp.float32) * weight[0]).astype(out.dtype) if weight else value
                strips.store(out, row, strip, weighed)

    for_each(block, blocks, units, rows_of, copy)


def _write_zeros(block, blocks: int, batches: int, strips: Strips, order, out) -> None:
    num_rows = order.shape[0]
    zeros = strips.zeros(out.dtype)

    def assignments_of(batch):
        rows = [batch * _ROWS_AT_ONCE + i for i in range(_ROWS_AT_ONCE)]
        return [(row, order[jnp.minimum(row, num_rows - 1)]) for row in rows]

    def clear(_, assignments):
        for row, assignment in assignments:

            @pl.when((assignment < 0) & (row < num_rows))
            def _(row=row):
                for strip in range(strips.count):
                    strips.store(out, row, strip, zeros)

    for_each(block, blocks, batches, assignments_of, clear)


def _config(num_tokens: int) -> Config:
    """Few tokens are spread over as many blocks as there are."""
    return Config(blocks=65536, zero_blocks=132, vectors=8 if num_tokens >= 1024 else 1)

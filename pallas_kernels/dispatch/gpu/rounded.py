"""Tokens copied by a plan and rounded to 8 bits on the way, on NVIDIA GPUs: one launch for few rows.

    floor in time = how long a kernel takes to start

Each copy of a token is rounded for itself. Of many rows that would cost more than it saves: then tokens are rounded in
a kernel of their own, and copied in 8 bits.

A block takes a strip of a row, 8 blocks of 128 elements, each held by neighbouring threads of a warp, which find its
scale among them. Scales are written as products read them, [blocks, R], and transposed by name only.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import Chip
from pallas_kernels.dispatch import reference
from pallas_kernels.dispatch.gpu.copies import dispatch
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.rounding import is_rounded, rounded_in_blocks
from pallas_kernels.on_gpu.strips import LEAST_COLUMNS, cut_in_blocks, for_each, launch, store
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor
from pallas_kernels.quantize_rows import SCALING, rows_in_8_bits

_FEW_BYTES = 1 << 24
"""Of rows as they are read, which pass in as little time as a launch takes."""

_BLOCKS_PER_CORE = 8


def dispatch_rounded(x: jax.Array, plan: Plan, *, dtype: jnp.dtype) -> jax.Array | QTensor:
    """See `pallas_kernels.dispatch.dispatch`, of a `ToRound`."""
    chip = hopper_chip("dispatch")
    num_tokens, columns = x.shape
    num_rows = plan.order.shape[0]
    if num_rows == 0 or num_tokens == 0:
        return reference.dispatch_rounded(x, plan, dtype=dtype)
    if not takes_few(x, dtype, num_rows=num_rows):
        return dispatch(rows_in_8_bits(x, dtype, scaling=SCALING, backend="pallas_gpu"), plan)
    strips, top_k = cut_in_blocks("dispatch", columns), plan.inverse.shape[1]
    units = num_rows * strips.count
    programs = min(units, _most_programs(chip))

    def body(x_ref, order, values, scale):
        def load(unit):
            row, strip = strips.place(unit)
            assignment = order[row]
            token = lax.div(jnp.maximum(assignment, 0), jnp.int32(top_k))
            return assignment, strips.load(x_ref, token, strip)

        def finish(unit, loaded):
            (row, strip), (assignment, value) = strips.place(unit), loaded
            rounded, scales = rounded_in_blocks(jnp.where(assignment >= 0, value.astype(jnp.float32), 0.0), dtype)
            strips.store(values, row, strip, rounded)
            store(scale.at[strips.window(strip), row], jnp.where(assignment >= 0, scales, 0.0))

        for_each(lax.axis_index("block"), programs, units, load, finish)

    outs = [
        jax.ShapeDtypeStruct((num_rows, strips.vectors, strips.vector), dtype),
        jax.ShapeDtypeStruct((strips.vectors, num_rows), jnp.float32),
    ]
    values, scale = launch(body, outs, strips.view(x), plan.order, name="dispatch_rounded", blocks=programs)
    return QTensor(values.reshape(num_rows, columns), scale.T)


def takes_few(x: jax.Array, dtype: jnp.dtype, *, num_rows: int) -> bool:
    """Whether rows of x are few, and long enough, to be rounded as they are copied."""
    columns = x.shape[1]
    return (
        is_rounded(x.dtype, dtype) and columns >= LEAST_COLUMNS and num_rows * columns * x.dtype.itemsize <= _FEW_BYTES
    )


def _most_programs(chip: Chip) -> int:
    return chip.cores * _BLOCKS_PER_CORE

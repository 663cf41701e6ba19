"""Copying rows by a plan on TPUs, through fast memory.

    floor in time = (bytes of x + bytes of the result) / HBM bandwidth

which is what the kernel moves where x fits fast memory: x is read once, the result written once. Where it does not, the
rows are read for each of the result's, together with those that share their 32-bit words: twice the bytes of the
result in BF16, four times in 8 bits.

The result of a step is made word by word: the rows that will share words are gathered to different places of the
buffer, and joined by shifts. So any dtype of 1, 2 or 4 bytes is copied bit by bit, NaN and all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cost import dispatch_cost
from pallas_kernels.dispatch import reference
from pallas_kernels.on_tpu.device import tpu_chip
from pallas_kernels.on_tpu.row_copies import SUBLANES, Rows, Steps, pipelined
from pallas_kernels.plan import Plan, tight_plan
from pallas_kernels.plan.counting_sort import Sorted, counting_sort
from pallas_kernels.quantize import QTensor
from pallas_kernels.quantize_rows.reference import quantize_rows
from pallas_kernels.stage import Stage
from pallas_kernels.tracing.varying import result_varying_as


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_rows: rows of the result in a step, a multiple of the rows in a tile.
      is_resident: whether x is held in fast memory.
    """

    block_rows: int
    is_resident: bool


def dispatch(x: jax.Array | QTensor, plan: Plan) -> jax.Array | QTensor:
    """See `pallas_kernels.dispatch.dispatch`. The scales of a QTensor, a few numbers a row, are left to XLA."""
    if isinstance(x, QTensor):
        return QTensor(dispatch_rows(x.values, plan), reference.dispatch(x.scale, plan))
    return dispatch_rows(x, plan)


def dispatch_rounded(x: jax.Array, plan: Plan, *, dtype: jnp.dtype) -> jax.Array | QTensor:
    """See `pallas_kernels.dispatch.dispatch`, of a `ToRound`: XLA rounds."""
    return dispatch(quantize_rows(x, dtype=dtype), plan)


def plan_and_dispatch(
    x: jax.Array, topk_ids: jax.Array, *, num_groups: int, dtype: jnp.dtype
) -> tuple[Sorted, jax.Array | QTensor]:
    """See `pallas_kernels.dispatch.plan_and_dispatch`: one after the other."""
    by_group = counting_sort(topk_ids.reshape(-1), num_groups, backend="pallas_tpu")
    return by_group, dispatch_rounded(x, tight_plan(by_group, topk_ids.shape), dtype=dtype)


def dispatch_weighted(x: jax.Array, plan: Plan, weights: jax.Array, *, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `pallas_kernels.dispatch.reference.dispatch_weighted`."""
    return reference.weighted(dispatch_rows(x, plan), plan, weights, out_dtype)


def dispatch_rows(x: jax.Array, plan: Plan, config: Config | None = None, stage: Stage = "full") -> jax.Array:
    """The kernel: x [T, H] -> [R, H].

    Args:
      x: [T, H] of any dtype of 1, 2 or 4 bytes.
      plan: made from topk_ids [T, K].
      config: for tuning.
      stage: "comp" copies no rows, "dma" copies and joins none; their results mean nothing.

    Raises:
      Unsupported: x has another dtype.
    """
    chip = tpu_chip()
    rows = Rows.of("dispatch", x, chip)
    num_rows = plan.order.shape[0]
    if plan.inverse.size == 0 or num_rows == 0:
        return reference.dispatch(x, plan)
    config = config or _config(rows, num_rows)
    rows = dataclasses.replace(rows, is_resident=config.is_resident)
    block, words = config.block_rows, config.block_rows // rows.packing
    steps = Steps.of(pl.cdiv(num_rows, block), chip.cores)
    token = jnp.where(plan.order >= 0, plan.order // plan.inverse.shape[1], -1)
    token = jnp.pad(token, (0, steps.cores * steps.each * block - num_rows), constant_values=-1)
    by_word = token.reshape(-1, rows.packing)
    copies = rows.copies(by_word.reshape(-1, words, rows.packing).mT.reshape(-1, 1, block))
    scalars = functools.partial(pl.BlockSpec, (1, 1, block), memory_space=pltpu.SMEM)
    cost = dispatch_cost(x.shape[0], num_rows, rows.columns, in_dtype=x.dtype, out_dtype=x.dtype)
    seen, out = rows.viewed(x), rows.result(num_rows)
    result = pl.pallas_call(
        functools.partial(_kernel, rows=rows, steps=steps, stage=stage),
        out_shape=result_varying_as(x, out.shape, out.dtype),
        grid=steps.grid,
        in_specs=[
            scalars(lambda *at: (steps.ahead(*at), 0, 0)),
            scalars(lambda *at: (steps.now(*at), 0, 0)),
            pl.BlockSpec((words, rows.packing), lambda *at: (steps.now(*at), 0)),
            rows.spec,
        ],
        out_specs=pl.BlockSpec(rows.result_block(block), lambda *at: (steps.result(*at), 0)),
        scratch_shapes=rows.scratch(block),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=rows.vmem_limit(seen, block, (block, rows.columns), (words, rows.packing)),
        ),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=cost.hbm_bytes),
        name="dispatch",
    )(copies, copies, by_word, seen)
    return rows.finished(result, num_rows, x.shape[1])


def _kernel(ahead, now, by_word, x, out, buffers, semaphores, *, rows: Rows, steps: Steps, stage: Stage) -> None:
    words, result = by_word.shape[0], rows.words(out)

    def join(buffer) -> None:
        @pl.loop(0, words, step=SUBLANES)
        def _(first):
            first = pl.multiple_of(first, SUBLANES)
            pick = [rows.picker(by_word[pl.ds(first, SUBLANES), pl.ds(p, 1)]) for p in range(rows.packing)]
            for strip in rows.strips:
                joined = jnp.zeros((SUBLANES, strip.size), jnp.uint32)
                for place in range(rows.packing):
                    part = pick[place](buffer[pl.ds(place * words + first, SUBLANES), strip])
                    joined |= lax.shift_left(part, jnp.uint32(8 * rows.dtype.itemsize * place))
                result[pl.ds(first, SUBLANES), strip] = joined

    pipelined(rows, steps, ahead, now, x, buffers, semaphores, stage, join)


def _config(rows: Rows, num_rows: int) -> Config:
    return Config(rows.rows_at_once(num_rows, SUBLANES * rows.packing), rows.is_resident)

"""Weighted sums of rows by a plan on TPUs, through fast memory.

    floor in time of combine          = (bytes of the rows in use + those of residual and result) / HBM bandwidth
    floor in time of combine_dweights = (bytes of the rows in use + bytes of dout) / HBM bandwidth

which is what the kernels move where all rows fit fast memory, those without an assignment included. Where they do not,
rows are read one by one, in BF16 each with the one that shares its 32-bit words: twice the bytes.

A step takes a few tokens: the rows of their first choices, then those of their second ones, and so on, each choice in a
block of its own, so that the sum runs over blocks in the order of k.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.combine import reference
from pallas_kernels.cost import combine_cost
from pallas_kernels.on_tpu.device import tpu_chip
from pallas_kernels.on_tpu.row_copies import SUBLANES, Rows, Steps, pipelined
from pallas_kernels.plan import Plan
from pallas_kernels.stage import Stage
from pallas_kernels.tracing.varying import result_varying_as

_TILE = 2 * SUBLANES  # tokens in a tile of BF16, the narrowest result


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_tokens: tokens in a step, a multiple of 16.
      is_resident: whether the rows are held in fast memory.
    """

    block_tokens: int
    is_resident: bool


def combine(
    rows: jax.Array,
    plan: Plan,
    weights: jax.Array,
    residual: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: Config | None = None,
    stage: Stage = "full",
) -> jax.Array:
    """See `pallas_kernels.combine.combine`.

    Args:
      rows: [R, H], BF16 or float32.
      plan: the plan.
      weights: [T, K].
      residual: [T, H], BF16 or float32, or None.
      out_dtype: of the result, BF16 or float32.
      config: for tuning.
      stage: "comp" copies no rows, "dma" copies and sums none; their results mean nothing.

    Raises:
      Unsupported: rows, residual or result have another dtype.
    """
    looked_at = _look_at("combine", rows, out_dtype, *([] if residual is None else [residual.dtype]))
    if plan.inverse.size == 0 or rows.shape[0] == 0:
        return reference.combine(rows, plan, weights, residual, out_dtype=out_dtype)
    out = jax.ShapeDtypeStruct((plan.inverse.shape[0], looked_at.columns), jnp.dtype(out_dtype))
    by_token = [weights.astype(jnp.float32)]
    if residual is not None:
        by_token.append(_padded(residual, looked_at))
    y = _call(_combine_kernel, looked_at, rows, plan, by_token, out, config, stage, name="combine")
    return y[:, : rows.shape[1]]


combine_onto = combine
"""`combine` with a residual."""


def combine_dweights(
    rows: jax.Array, plan: Plan, dout: jax.Array, config: Config | None = None, stage: Stage = "full"
) -> jax.Array:
    """See `pallas_kernels.combine.reference.combine_dweights`; what it refuses, and the rest, as `combine`."""
    looked_at = _look_at("combine_dweights", rows, dout.dtype)
    if plan.inverse.size == 0 or rows.shape[0] == 0:
        return reference.combine_dweights(rows, plan, dout)
    out = jax.ShapeDtypeStruct(plan.inverse.shape, jnp.float32)
    dout = _padded(dout, looked_at)
    return _call(_dweights_kernel, looked_at, rows, plan, [dout], out, config, stage, name="combine_dweights")


def _padded(x: jax.Array, looked_at: Rows) -> jax.Array:
    """Tokens [T, H] with as many columns as the kernel looks at."""
    return jnp.pad(x, ((0, 0), (0, looked_at.columns - x.shape[1])))


def _look_at(operator: str, rows: jax.Array, *others: jax.typing.DTypeLike) -> Rows:
    for dtype in (rows.dtype, *(jnp.dtype(other) for other in others)):
        if dtype not in (jnp.bfloat16, jnp.float32):
            raise Unsupported(f"{operator}: TPUs compute in BF16 and float32, got {dtype.name}")
    return Rows.of(operator, rows, tpu_chip())


def _call(kernel, looked_at: Rows, rows, plan: Plan, by_token, out, config: Config | None, stage: Stage, *, name: str):
    """Runs `kernel` over blocks of tokens; each of `by_token` [T, …] and `out` [T, …] comes in such blocks too."""
    chip = tpu_chip()
    num_tokens, top_k = plan.inverse.shape
    config = config or Config(looked_at.rows_at_once(num_tokens, _TILE, factor=top_k), looked_at.is_resident)
    looked_at = dataclasses.replace(looked_at, is_resident=config.is_resident)
    block = config.block_tokens
    steps = Steps.of(pl.cdiv(num_tokens, block), chip.cores)
    row = jnp.pad(plan.inverse, ((0, steps.cores * steps.each * block - num_tokens), (0, 0)), constant_values=-1)
    copies = looked_at.copies(row.reshape(-1, block, top_k).mT.reshape(-1, 1, top_k * block))
    scalars = functools.partial(pl.BlockSpec, (1, 1, top_k * block), memory_space=pltpu.SMEM)
    has_residual = len(by_token) > 1
    cost = combine_cost(num_tokens, plan.inverse.size, rows.shape[1], dtype=rows.dtype, has_residual=has_residual)
    seen = looked_at.viewed(rows)
    blocks = (block, top_k), *((block, each.shape[1]) for each in by_token), (block, out.shape[1])
    return pl.pallas_call(
        functools.partial(kernel, rows=looked_at, steps=steps, stage=stage),
        out_shape=result_varying_as(rows, out.shape, out.dtype),
        grid=steps.grid,
        in_specs=[
            scalars(lambda *at: (steps.ahead(*at), 0, 0)),
            scalars(lambda *at: (steps.now(*at), 0, 0)),
            pl.BlockSpec((block, top_k), lambda *at: (steps.now(*at), 0)),
            *(pl.BlockSpec((block, each.shape[1]), lambda *at: (steps.result(*at), 0)) for each in by_token),
            looked_at.spec,
        ],
        out_specs=pl.BlockSpec((block, out.shape[1]), lambda *at: (steps.result(*at), 0)),
        scratch_shapes=looked_at.scratch(top_k * block),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=looked_at.vmem_limit(seen, copies.shape[2], *blocks),
        ),
        cost_estimate=pl.CostEstimate(flops=cost.flops, transcendentals=0, bytes_accessed=cost.hbm_bytes),
        name=name,
    )(copies, copies, row, *by_token, seen)


def _for_each_tile(row, rows: Rows, use) -> None:
    """Calls use(tile, rows of its tokens [tile, K], choice) for every few tokens of a block.

    choice(buffer, k, strip) are the tokens' k-th rows, some columns of them, in float32; anything where there is none.
    """
    tokens, top_k = row.shape

    @pl.loop(0, tokens, step=_TILE)
    def _(first):
        first = pl.multiple_of(first, _TILE)
        tile = pl.ds(first, _TILE)
        chosen = [row[tile, pl.ds(k, 1)] for k in range(top_k)]

        def choice(buffer, k: int, strip) -> jax.Array:
            bits = rows.shifted(buffer[pl.ds(k * tokens + first, _TILE), strip], chosen[k])
            # A BF16 number is the upper half of a float32 one.
            return lax.bitcast_convert_type(bits << 16 if rows.packing == 2 else bits, jnp.float32)

        use(tile, row[tile], choice)


def _combine_kernel(ahead, now, row, weights, *refs, rows: Rows, steps: Steps, stage: Stage) -> None:
    *residual, source, out, buffers, semaphores = refs

    def add_up(buffer) -> None:
        def of_tile(tile, row, choice) -> None:
            for strip in rows.strips:
                total = jnp.zeros((_TILE, strip.size), jnp.float32)
                for k in range(row.shape[1]):
                    share = choice(buffer, k, strip) * weights[tile, pl.ds(k, 1)]
                    # The first share itself, not 0 plus it: a single choice keeps the sign of its zeros.
                    total = jnp.where(row[:, k : k + 1] >= 0, total + share if k else share, total)
                for each in residual:
                    total += each[tile, strip].astype(jnp.float32)
                out[tile, strip] = total.astype(out.dtype)

        _for_each_tile(row, rows, of_tile)

    pipelined(rows, steps, ahead, now, source, buffers, semaphores, stage, add_up)


def _dweights_kernel(
    ahead, now, row, dout, source, out, buffers, semaphores, *, rows: Rows, steps: Steps, stage: Stage
) -> None:
    def multiply(buffer) -> None:
        def of_tile(tile, row, choice) -> None:
            for k in range(row.shape[1]):
                product = jnp.zeros((_TILE, 1), jnp.float32)
                for strip in rows.strips:
                    gradient = dout[tile, strip].astype(jnp.float32)
                    share = jnp.where(row[:, k : k + 1] >= 0, choice(buffer, k, strip), 0)
                    product += jnp.sum(gradient * share, axis=1, keepdims=True)
                out[tile, pl.ds(k, 1)] = product

        _for_each_tile(row, rows, of_tile)

    pipelined(rows, steps, ahead, now, source, buffers, semaphores, stage, multiply)

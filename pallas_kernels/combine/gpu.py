"""Weighted sums of rows by a plan on NVIDIA GPUs, through registers.

A block takes a strip of a token at a time: it loads the strips of the token's rows, sums them in float32 in the order
of k and stores the result. Each element is read and written once.

    floor in time of combine          = (bytes of the rows in use + those of residual and result) / HBM bandwidth
    floor in time of combine_dweights = (bytes of the rows in use + bytes of dout) / HBM bandwidth
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine import reference
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.on_gpu.strips import cut, for_each, launch
from pallas_kernels.plan import Plan


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      blocks: most blocks.
      vectors: most 16-byte vectors of a row that a thread holds.
    """

    blocks: int
    vectors: int


def combine(
    rows: jax.Array,
    plan: Plan,
    weights: jax.Array,
    residual: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.combine.combine`; `config` is for tuning."""
    require_hopper("combine")
    num_tokens, top_k = plan.inverse.shape
    columns = rows.shape[1]
    config = config or _config(num_tokens)
    strips = cut("combine", columns, rows.dtype, config.vectors)
    if plan.inverse.size == 0 or rows.shape[0] == 0:
        return reference.combine(rows, plan, weights, residual, out_dtype=out_dtype)
    units = num_tokens * strips.count
    blocks = min(config.blocks, units)

    def body(rows_ref, inverse, weights_ref, residual_ref, out):
        def fetch(unit):
            token = lax.div(unit, jnp.int32(strips.count))
            return [(inverse[token, k], weights_ref[token, k]) for k in range(top_k)]

        def add_up(unit, choices):
            token, strip = lax.div(unit, jnp.int32(strips.count)), lax.rem(unit, jnp.int32(strips.count))
            total = strips.zeros(jnp.float32)
            for k, (row, weight) in enumerate(choices):
                share = strips.load(rows_ref, jnp.maximum(row, 0), strip).astype(jnp.float32) * weight
                # The first share itself, not 0 plus it: a single choice keeps the sign of its zeros.
                total = jnp.where(row >= 0, total + share if k else share, total)
            if residual_ref is not None:
                total += strips.load(residual_ref, token, strip).astype(jnp.float32)
            strips.store(out, token, strip, total.astype(out.dtype))

        for_each(lax.axis_index("block"), blocks, units, fetch, add_up)

    out = jax.ShapeDtypeStruct((num_tokens, strips.vectors, strips.vector), jnp.dtype(out_dtype))
    viewed = None if residual is None else strips.view(residual)
    inputs = strips.view(rows), plan.inverse, weights.astype(jnp.float32), viewed
    return launch(body, out, *inputs, name="combine", blocks=blocks).reshape(num_tokens, columns)


combine_onto = combine
"""`combine` with a residual."""


def combine_dweights(rows: jax.Array, plan: Plan, dout: jax.Array) -> jax.Array:
    """See `pallas_kernels.combine.reference.combine_dweights`. Rows that strips cannot divide are left to XLA."""
    require_hopper("combine")
    num_tokens, top_k = plan.inverse.shape
    strips = cut("combine_dweights", rows.shape[1], rows.dtype, 1)
    if plan.inverse.size == 0 or rows.shape[0] == 0 or strips.overlap:
        return reference.combine_dweights(rows, plan, dout)
    blocks = min(_config(num_tokens).blocks, num_tokens)

    def body(rows_ref, inverse, dout_ref, out):
        def fetch(token):
            return [inverse[token, k] for k in range(top_k)]

        def multiply(token, chosen):
            def add_strip(strip, totals):
                gradient = strips.load(dout_ref, token, strip).astype(jnp.float32)
                values = [strips.load(rows_ref, jnp.maximum(row, 0), strip).astype(jnp.float32) for row in chosen]
                return [total + gradient * value for total, value in zip(totals, values, strict=True)]

            totals = lax.fori_loop(0, strips.count, add_strip, [strips.zeros(jnp.float32) for _ in chosen])
            for k, (row, total) in enumerate(zip(chosen, totals, strict=True)):
                out[token, k] = jnp.where(row >= 0, jnp.sum(total), 0.0)

        for_each(lax.axis_index("block"), blocks, num_tokens, fetch, multiply)

    out = jax.ShapeDtypeStruct((num_tokens, top_k), jnp.float32)
    return launch(body, out, strips.view(rows), plan.inverse, strips.view(dout), name="combine_dweights", blocks=blocks)


def _config(num_tokens: int) -> Config:
    """Few tokens are spread over as many blocks as there are."""
    return Config(blocks=65536, vectors=8 if num_tokens >= 1024 else 1)

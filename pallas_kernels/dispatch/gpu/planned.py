"""Few tokens planned, copied and rounded to 8 bits in one launch on NVIDIA GPUs.

    floor in time = how long a kernel takes to start

The row of an assignment is the number of assignments that come before it, which any block can count for itself
(`plan.gpu.few`). So there is a block for a strip of each token (`rounded` says of what): it rounds that once and writes
it to the K rows of the token. The first blocks write the plan, which is for others.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dispatch.gpu.rounded import dispatch_rounded, takes_few
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.on_gpu.rounding import rounded_in_blocks
from pallas_kernels.on_gpu.strips import cut_in_blocks, launch, store
from pallas_kernels.plan import tight_plan
from pallas_kernels.plan.counting_sort import Sorted, counting_sort
from pallas_kernels.plan.gpu.few import FewKeys, Memory, blocks_to_sort, results
from pallas_kernels.plan.gpu.tiles import in_tiles
from pallas_kernels.quantize import QTensor

_MOST_CHOICES = 16
"""Rows of a token."""

_MOST_GROUPS = 4096
"""As many as the sort takes: their numbers, times those of the keys, are far from what int32 holds."""


def plan_and_dispatch(
    x: jax.Array, topk_ids: jax.Array, *, num_groups: int, dtype: jnp.dtype
) -> tuple[Sorted, jax.Array | QTensor]:
    """See `pallas_kernels.dispatch.plan_and_dispatch`."""
    require_hopper("dispatch")
    (num_tokens, columns), top_k, num_keys = x.shape, topk_ids.shape[1], topk_ids.size
    fits = num_keys > 0 and top_k <= _MOST_CHOICES and num_groups <= _MOST_GROUPS
    if not fits or not takes_few(x, dtype, num_rows=num_keys):
        by_group = counting_sort(topk_ids.reshape(-1), num_groups, backend="pallas_gpu")
        return by_group, dispatch_rounded(x, tight_plan(by_group, topk_ids.shape), dtype=dtype)

    keys, strips = in_tiles(topk_ids.reshape(-1)), cut_in_blocks("dispatch", columns)
    sorting = blocks_to_sort(keys, num_groups)

    def body(x_ref, keys, rows, order, group_sizes, values, scale, memory):
        block, few = lax.axis_index("block"), FewKeys(keys, memory, num_groups)
        few.copy()

        @pl.when(block < sorting)
        def _():
            few.sort(block, rows, order, group_sizes)

        @pl.when(block >= sorting)
        def _():
            token, strip = strips.place(block - sorting)
            rounded, scales = rounded_in_blocks(strips.load(x_ref, token, strip).astype(jnp.float32), dtype)
            for row, is_made in few.place(token * top_k, top_k):
                store(scale.at[strips.window(strip), row], jnp.where(is_made, scales, 0.0))

                @pl.when(is_made)
                def _(row=row):
                    strips.store(values, row, strip, rounded)

                @pl.when(jnp.logical_not(is_made))
                def _(row=row):
                    strips.store(values, row, strip, strips.zeros(dtype))

    outs = [
        *results(keys, num_groups),
        jax.ShapeDtypeStruct((num_keys, strips.vectors, strips.vector), dtype),
        jax.ShapeDtypeStruct((strips.vectors, num_keys), jnp.float32),
    ]
    rows, order, group_sizes, values, scale = launch(
        body,
        outs,
        strips.view(x),
        keys,
        name="plan_and_dispatch",
        blocks=sorting + num_tokens * strips.count,
        scratch=[Memory.describe(keys)],
    )
    by_group = Sorted(rows[:num_keys], order[:num_keys], group_sizes)
    return by_group, QTensor(values.reshape(num_keys, columns), scale.T)

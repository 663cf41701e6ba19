"""The all-to-all as XLA has it, and what it means where XLA has none."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.moved_rows import dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor
from pallas_kernels.tracing.varying import vary_over, varying_axes


def all_to_all(
    x: jax.Array | QTensor, blocks: Blocks, num_rows: int, axes: tuple[str, ...], plan: Plan | None
) -> jax.Array | QTensor:
    """See `pallas_kernels.all_to_all.all_to_all`. Rows outside the blocks are zeros."""
    if plan is not None:
        x = dispatched("xla", x=x, plan=plan)
    ragged = functools.partial(_ragged, num_rows=num_rows, axes=axes)
    ways = {
        "tpu": ragged,
        "cpu": functools.partial(_as_bytes, functools.partial(emulated, num_rows=num_rows, axes=axes)),
        "default": functools.partial(_as_bytes, ragged),
    }
    return jax.tree.map(lambda leaf: lax.platform_dependent(leaf, blocks, **ways), x)


def _ragged(x: jax.Array, blocks: Blocks, *, num_rows: int, axes: tuple[str, ...]) -> jax.Array:
    """`jax.lax.ragged_all_to_all` of one array."""
    sizes = blocks.send_offsets, blocks.send_sizes, blocks.put_offsets, blocks.recv_sizes
    result = vary_over(jnp.zeros((num_rows, *x.shape[1:]), x.dtype), varying_axes(x))
    return lax.ragged_all_to_all(x, result, *(each.reshape(-1) for each in sizes), axis_name=axes)


def emulated(x: jax.Array, blocks: Blocks, *, num_rows: int, axes: tuple[str, ...]) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` does, for any platform: every chip sees all rows, and takes those sent to it.

    Where chips do not agree on sizes and places, or a block reaches beyond the rows that there are, which is undefined
    there, the result is NaN, or all bits set.
    """
    sizes, takes, puts = (
        lax.all_to_all(each, axes, 0, 0, tiled=True)
        for each in (blocks.send_sizes, blocks.send_offsets, blocks.put_offsets)
    )
    chips, num_rows_each = sizes.shape[0], x.shape[0]
    if num_rows == 0 or num_rows_each == 0:
        return jnp.zeros((num_rows, *x.shape[1:]), x.dtype)
    everything = lax.all_gather(x, axes, tiled=True)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    begins, ends = puts.reshape(-1), (puts + sizes).reshape(-1)
    is_inside = (begins <= row) & (row < ends)  # [R, ep · n]
    block = is_inside.argmax(1)
    first = (jnp.arange(chips, dtype=jnp.int32)[:, None] * num_rows_each + takes).reshape(-1)
    source = first[block] + row[:, 0] - begins[block]
    wanted = blocks.recv_sizes, blocks.take_offsets, blocks.recv_offsets
    is_used = sizes > 0
    agreed = (sizes == blocks.recv_sizes).all()
    for told, known in zip((sizes, takes, puts), wanted, strict=True):
        agreed &= (jnp.where(is_used, told - known, 0) == 0).all()
    for begin, most in ((takes, num_rows_each), (puts, num_rows)):
        agreed &= (~is_used | ((begin >= 0) & (begin + sizes <= most))).all()
    rows = jnp.where(is_inside.any(1)[:, None], everything[source], 0)
    nothing = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
    return jnp.where(agreed, rows, jnp.asarray(nothing, x.dtype))


def _as_bytes(move, x: jax.Array, blocks: Blocks) -> jax.Array:
    """move(x, blocks), elements of one byte as uint8: not every collective library knows FP8."""
    if x.dtype.itemsize > 1 or x.dtype == jnp.uint8:
        return move(x, blocks)
    return lax.bitcast_convert_type(move(lax.bitcast_convert_type(x, jnp.uint8), blocks), x.dtype)

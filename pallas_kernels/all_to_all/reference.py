"""The all-to-all as XLA has it, and what it means where XLA has none."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.all_to_all.places import first_places
from pallas_kernels.all_to_all.routes import Routes
from pallas_kernels.moved_rows import dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor
from pallas_kernels.tracing.varying import vary_over, varying_axes


def all_to_all(
    x: jax.Array | QTensor, blocks: Blocks | Routes, num_rows: int, axes: tuple[str, ...], plan: Plan | None
) -> jax.Array | QTensor:
    """See `pallas_kernels.all_to_all.all_to_all`. Rows outside the blocks are zeros."""
    if plan is not None:
        x = dispatched("xla", x=x, plan=plan)
    if isinstance(blocks, Routes):
        by_route = functools.partial(_as_bytes, functools.partial(routed, axes=axes))
        return jax.tree.map(lambda leaf: by_route(leaf, blocks), x)
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
    return jnp.where(agreed, rows, _nothing(x.dtype))


def routed(x: jax.Array, routes: Routes, *, axes: tuple[str, ...]) -> jax.Array:
    """Rows by their routes: every chip sees all rows, and takes those whose addresses it has.

    Where chips do not agree on routes, the result is NaN, or all bits set; rows from nowhere are zeros.
    """
    num_rows, num_rows_each = routes.addresses.shape[0], x.shape[0]
    if num_rows == 0 or num_rows_each == 0:
        return jnp.zeros((num_rows, *x.shape[1:]), x.dtype)
    everything = lax.all_gather(x, axes, tiled=True)
    place = jnp.arange(num_rows, dtype=jnp.int32)
    arrives = (place < routes.num_addresses) & (routes.addresses >= 0)
    address = jnp.where(arrives, routes.addresses, 0)
    targets, used = lax.all_gather(routes.targets, axes), lax.all_gather(routes.num_targets, axes)
    is_sent = (targets >= 0) & (jnp.arange(num_rows_each) < used[:, None])
    mine = lax.axis_index(axes) * num_rows + place
    agreed = (jnp.where(arrives, targets.reshape(-1)[address] - mine, 0) == 0).all()
    agreed &= jnp.sum(is_sent & (targets // num_rows == lax.axis_index(axes))) == jnp.sum(arrives)
    rows = jnp.where(arrives[:, None], everything[address], jnp.zeros((), x.dtype))
    return jnp.where(agreed, rows, _nothing(x.dtype))


def _nothing(dtype: jax.typing.DTypeLike) -> jax.Array:
    """What stands where chips do not agree."""
    is_floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(jnp.nan if is_floating else jnp.iinfo(dtype).max, dtype)


def make_routes(topk_ids: jax.Array, by_expert: Plan, num_rows: int, axes: tuple[str, ...]) -> tuple[Routes, jax.Array]:
    """See `pallas_kernels.all_to_all.make_routes`."""
    rank, chips = lax.axis_index(axes), lax.axis_size(axes)
    num_choices, num_local = topk_ids.size, by_expert.group_sizes.size // chips
    counts = lax.all_gather(by_expert.group_sizes, axes)  # [ep, E]
    place = first_places(counts, num_local)[rank] - by_expert.offsets
    ids, row = jnp.maximum(topk_ids, 0).reshape(-1), by_expert.inverse.reshape(-1)
    chip = ids // num_local
    targets = jnp.where(row >= 0, chip * num_rows + place[ids] + row, -1) if num_choices else row
    everyones = lax.all_gather(targets, axes, tiled=True) - rank * num_rows
    is_mine = (everyones >= 0) & (everyones < num_rows)
    numbers = jnp.arange(chips * num_choices, dtype=jnp.int32)
    addresses = jnp.zeros((num_rows,), jnp.int32).at[jnp.where(is_mine, everyones, num_rows)].set(numbers, mode="drop")
    sizes = counts.sum(0, dtype=jnp.int32).reshape(chips, num_local)[rank]
    return Routes(targets, addresses, jnp.int32(num_choices), sizes.sum(dtype=jnp.int32)), sizes


def _as_bytes(move, x: jax.Array, blocks: Any) -> jax.Array:
    """move(x, blocks), elements of one byte as uint8: not every collective library knows FP8."""
    if x.dtype.itemsize > 1 or x.dtype == jnp.uint8:
        return move(x, blocks)
    return lax.bitcast_convert_type(move(lax.bitcast_convert_type(x, jnp.uint8), blocks), x.dtype)

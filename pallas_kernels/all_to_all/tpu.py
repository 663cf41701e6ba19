"""The all-to-all by remote DMA on TPUs: every chip writes its rows where they belong in its peers' memory.

    floor in time = bytes sent to other chips / bandwidth of the chip's links

Rows go straight from HBM to HBM, block by block, each block as long as it is; an empty one costs a comparison. Before
the first remote write every chip has to know that its peers have entered the kernel, as their results are free to be
written only from then on:

    chip a    ──signal──►  barrier  ──signal──►  passed   writes ═══►   waits for all bytes, and for `passed`
    chip b    ──signal──►  of all   ──signal──►  of all   writes ═══►   waits for all bytes, and for `passed`

The barrier semaphore is one for all calls, and counts. A chip that ran ahead into the next call would signal it twice,
and be taken for a chip that is late. So no chip leaves before all have `passed` the barrier, which they tell each other
through a semaphore of this call. That wait comes last, when it has long been fulfilled.

Received bytes are counted: a chip knows how many rows it gets, and waits for just these.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.all_to_all.device_id import device_id
from pallas_kernels.all_to_all.reference import make_routes
from pallas_kernels.all_to_all.routes import Routes
from pallas_kernels.backend import Unsupported
from pallas_kernels.moved_rows import dispatched
from pallas_kernels.on_tpu.row_copies import LANES
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor
from pallas_kernels.tracing.varying import result_varying_as

__all__ = ["all_to_all", "make_routes"]  # TPUs move blocks: routes are XLA's to work out

_WORD = 4
_FIRST_ID = 64
"""Of the barriers' numbers, which these kernels share with others of the program: one for each set of mesh axes."""


def all_to_all(
    x: jax.Array | QTensor, blocks: Blocks | Routes, num_rows: int, axes: tuple[str, ...], plan: Plan | None
) -> jax.Array | QTensor:
    """See `pallas_kernels.all_to_all.all_to_all`.

    Raises:
      Unsupported: elements are not 1, 2 or 4 bytes long, or there are routes in place of blocks.
    """
    if isinstance(blocks, Routes):
        raise Unsupported("all_to_all: TPUs copy blocks of rows, got the routes of single rows")
    if plan is not None:
        x = dispatched("pallas_tpu", x=x, plan=plan)
    leaves, structure = jax.tree.flatten(x)
    if num_rows == 0 or x.shape[0] == 0 or x.shape[1] == 0:
        return jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), x)
    views = [_rows_untiled(leaf) for leaf in leaves]
    rank = lax.axis_index(axes)
    staying = blocks.send_sizes[rank].sum()
    other_axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().manual_axes if axis not in axes)
    totals = staying, blocks.send_sizes.sum() - staying, blocks.recv_sizes.sum() - staying
    own = jnp.stack([rank, *totals, *map(lax.axis_index, other_axes)])
    scalars = blocks.send_sizes, blocks.send_offsets, blocks.put_offsets, own
    semaphores = pltpu.SemaphoreType.DMA((len(views),))
    results = pl.pallas_call(
        functools.partial(
            _kernel, leaves=len(views), per_peer=blocks.send_sizes.shape[1], axes=axes, other_axes=other_axes
        ),
        out_shape=[result_varying_as(view, (num_rows, *view.shape[1:]), view.dtype) for view in views],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars)
        + [pl.BlockSpec(memory_space=pl.ANY)] * len(views),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(views),
        scratch_shapes=[semaphores, semaphores, semaphores, pltpu.SemaphoreType.REGULAR],
        compiler_params=pltpu.CompilerParams(has_side_effects=True, collective_id=_collective_id(axes)),
        name="all_to_all",
    )(*(each.reshape(-1).astype(jnp.int32) for each in scalars), *views)
    whole = [_rows_tiled(result, leaf.shape[1]) for result, leaf in zip(results, leaves, strict=True)]
    return jax.tree.unflatten(structure, whole)


def _kernel(
    sizes, sources, places, own, *refs, leaves: int, per_peer: int, axes: tuple[str, ...], other_axes: tuple[str, ...]
) -> None:
    xs, results = refs[:leaves], refs[leaves : 2 * leaves]
    own_copies, sent, received, passed = refs[2 * leaves :]
    chips = lax.axis_size(axes)
    rank, rows_staying, rows_sent, rows_received, *others = (own[i] for i in range(own.shape[0]))

    def device(peer) -> dict[str, jax.Array]:
        return dict(zip(other_axes, others, strict=True)) | device_id(peer, axes)

    def for_each_block(peer, act) -> None:
        @pl.loop(0, per_peer)
        def _(j):
            block = peer * per_peer + j
            rows = sizes[block]

            @pl.when(rows > 0)
            def _():
                for leaf in range(leaves):
                    source = xs[leaf].at[pl.ds(sources[block], rows)]
                    act(leaf, source, results[leaf].at[pl.ds(places[block], rows)])

    def for_each_peer(act) -> None:
        @pl.loop(1, chips)
        def _(step):  # each chip begins with its neighbour, so that no chip is written by all at once
            act(lax.rem(rank + step, jnp.int32(chips)))

    def wait_for(refs, semaphores, rows) -> None:
        @pl.when(rows > 0)
        def _():
            for leaf in range(leaves):
                bytes_of_rows = refs[leaf].at[pl.ds(0, rows)]
                pltpu.make_async_copy(bytes_of_rows, bytes_of_rows, semaphores.at[leaf]).wait()

    def copy_here(leaf, source, place) -> None:
        pltpu.make_async_copy(source, place, own_copies.at[leaf]).start()

    for_each_block(rank, copy_here)

    barrier = pltpu.get_barrier_semaphore()
    for_each_peer(lambda peer: pl.semaphore_signal(barrier, 1, device_id=device(peer)))
    pl.semaphore_wait(barrier, chips - 1)
    for_each_peer(lambda peer: pl.semaphore_signal(passed, 1, device_id=device(peer)))

    def send_to(peer) -> None:
        def send(leaf, source, place) -> None:
            ends = sent.at[leaf], received.at[leaf]
            pltpu.make_async_remote_copy(source, place, *ends, device_id=device(peer)).start()

        for_each_block(peer, send)

    for_each_peer(send_to)
    wait_for(xs, own_copies, rows_staying)
    wait_for(xs, sent, rows_sent)
    wait_for(results, received, rows_received)
    pl.semaphore_wait(passed, chips - 1)


def _collective_id(axes: tuple[str, ...]) -> int:
    """A number for the barrier among the chips along `axes`, another for every other set of axes of the mesh."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return _FIRST_ID + sum(1 << names.index(axis) for axis in axes)


def _rows_untiled(x: jax.Array) -> jax.Array:
    """[N, H] as [N, p, W], p elements to a word: a row fills whole tiles, and so blocks of rows begin anywhere."""
    if x.dtype.itemsize not in (1, 2, _WORD):
        raise Unsupported(f"all_to_all: rows have elements of 1, 2 or 4 bytes, got {x.dtype}")
    packing = _WORD // x.dtype.itemsize
    columns = LANES * packing
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % columns)))
    return x.reshape(x.shape[0], packing, -1)


def _rows_tiled(rows: jax.Array, columns: int) -> jax.Array:
    """What `_rows_untiled` undoes."""
    return rows.reshape(rows.shape[0], -1)[:, :columns]

"""The all-to-all by stores into the peers' memory, over NVLink, on NVIDIA GPUs.

    floor in time = bytes sent to other chips / bandwidth of the chip's link

Every row takes two bulk copies through a ring of slots in shared memory, which a single thread of a block issues; what
is one number a row, such as its scale, takes a register. By a plan, rows are copied from the tokens, and never exist on
the chip that sends them.

    x ──copy──► slot 0 … slot S − 1 ──copy──► result of the peer          copies out lag behind copies in

A row's peer and its place there are looked up in a table, so that a block may take rows from all over x. Where x is
sorted by chip, parts of it go to different chips. A block therefore takes a row of each part in turn, so that no link
rests while another is full.

XLA starts the kernel on no chip before all have reached it: results are then free to be written. Each block, once its
last row is with the peer, tells all chips so, and block 0 stays until all blocks of all chips have told it. A chip that
has left the kernel thus holds all of its rows, and no chip will write to it, or signal it, any more.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.all_to_all.blocks import Blocks
from pallas_kernels.all_to_all.device_id import device_id
from pallas_kernels.all_to_all.gpu.wait_for_all import wait_for_all
from pallas_kernels.all_to_all.routes import Routes
from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor

_COPY_BYTES = 128
"""Rows that are copied in bulk are a multiple of it: Mosaic lets each thread of a warpgroup expect an equal part."""

_NUMBER_BYTES = 4

_RING_BYTES = 200 * 1024
"""Of the 227 KiB of shared memory that a block can have."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      blocks: most blocks.
      slots: most rows that a block holds at once, two or more.
      lag: copies out that a block does not wait for when it reuses a slot.
    """

    blocks: int
    slots: int
    lag: int


_CONFIG = Config(blocks=132, slots=11, lag=3)
"""A block for each multiprocessor of an H200; of slots, as many as a block has rows of 128 tokens with 8 choices."""


def all_to_all(
    x: jax.Array | QTensor,
    blocks: Blocks | Routes,
    num_rows: int,
    axes: tuple[str, ...],
    plan: Plan | None,
    *,
    config: Config | None = None,
) -> jax.Array | QTensor:
    """See `pallas_kernels.all_to_all.all_to_all`; `config` is for tuning.

    Raises:
      Unsupported: a row is too long for two of them to be held in shared memory, or rows are too many for 32 bits.
    """
    require_hopper("all_to_all")
    leaves, structure = jax.tree.flatten(x)
    num_sources = x.shape[0] if plan is None else plan.order.shape[0]
    if num_rows == 0 or num_sources == 0 or x.shape[0] == 0 or x.shape[1] == 0:
        return jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), x)
    chips = lax.axis_size(axes)
    if chips * num_rows >= 2**31:
        raise Unsupported(f"all_to_all: rows of all {chips} chips must be fewer than 2³¹, got {num_rows} each")
    sent = [_as_sent(leaf, has_values=isinstance(x, QTensor)) for leaf in leaves]
    in_bulk, _ = _rows_and_numbers(sent)
    bytes_of_row = sum(each.shape[1] * each.dtype.itemsize for each in in_bulk)
    config = config or _CONFIG
    slots = min(config.slots, _RING_BYTES // bytes_of_row)
    if slots < 2:
        raise Unsupported(f"all_to_all: a row must have at most {_RING_BYTES // 2} bytes, got {bytes_of_row}")
    num_blocks = max(1, config.blocks // chips) * chips
    if isinstance(blocks, Routes):
        tables = [blocks.targets, blocks.num_targets[None]]
    else:
        tables = [targets(blocks, num_sources, num_rows), _num_used(blocks)[None]]
    if plan is not None:
        tables.append(plan.order)
    top_k = None if plan is None else plan.inverse.shape[1]
    work = _Work(axes, chips, num_blocks, num_rows, slots, min(config.lag, slots - 1), top_k)
    results = plgpu.kernel(
        functools.partial(_kernel, work, len(tables), len(sent)),
        out_type=[jax.ShapeDtypeStruct((num_rows, *each.shape[1:]), each.dtype) for each in sent],
        scratch_types=[
            *(plgpu.SMEM((slots, each.shape[1]), each.dtype) for each in in_bulk),
            plgpu.Barrier(num_arrivals=len(in_bulk), num_barriers=slots),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        kernel_name="all_to_all",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*tables, *sent)
    return jax.tree.unflatten(structure, [_as_it_was(each, leaf) for each, leaf in zip(results, leaves, strict=True)])


def targets(blocks: Blocks, num_source_rows: int, num_rows: int) -> jax.Array:
    """int32 [N], for each row of x: chip · R + its row in the result of that chip, or −1 if no block holds it."""
    row = jnp.arange(num_source_rows, dtype=jnp.int32)[:, None]
    sizes, begins, places = (x.reshape(-1) for x in (blocks.send_sizes, blocks.send_offsets, blocks.put_offsets))
    chips, per_chip = blocks.send_sizes.shape
    first = jnp.repeat(jnp.arange(chips, dtype=jnp.int32) * num_rows, per_chip) + places
    is_inside = (begins <= row) & (row < begins + sizes)  # [N, ep · n], one at most
    return jnp.sum(jnp.where(is_inside, first - begins + row + 1, 0), axis=1, dtype=jnp.int32) - 1


def _num_used(blocks: Blocks) -> jax.Array:
    """int32 []: the rows of x up to the last one that is in a block."""
    return jnp.max(jnp.where(blocks.send_sizes > 0, blocks.send_offsets + blocks.send_sizes, 0))


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is fixed of a call.

    Attributes:
      axes: along which there are `chips`.
      chips: their number.
      num_blocks: a multiple of it.
      num_rows: R.
      slots: of the ring.
      lag: see `Config`.
      top_k: K of the plan, None without one.
    """

    axes: tuple[str, ...]
    chips: int
    num_blocks: int
    num_rows: int
    slots: int
    lag: int
    top_k: int | None


class _Ticket(NamedTuple):
    """A row on its way.

    Attributes:
      target: chip · R + the row there; −1 for no row.
      source: where it is in x.
      numbers: those that travel beside it.
    """

    target: Any
    source: Any
    numbers: list[Any]


def _kernel(work: _Work, num_tables: int, num_sent: int, *refs) -> None:
    (target, num_used, *order), refs = refs[:num_tables], refs[num_tables:]
    (*rings, full) = refs[2 * num_sent :]
    xs, numbers = _rows_and_numbers(refs[:num_sent])
    results, results_of_numbers = _rows_and_numbers(refs[num_sent : 2 * num_sent])
    done = pl.get_global(plgpu.SemaphoreType.REGULAR)
    block, chips, slots = lax.axis_index("block"), work.chips, work.slots
    used = num_used[0]
    # The rows in use are cut into as many parts as there are chips, and a block takes one of each in turn.
    part_rows = lax.div(used + (chips - 1), jnp.int32(chips))
    blocks_of_part = work.num_blocks // chips
    turns = lax.div(part_rows + (blocks_of_part - 1), jnp.int32(blocks_of_part))

    def look_up(turn) -> _Ticket:
        """The row that this block takes at a turn."""
        in_part = turn * blocks_of_part + lax.div(block, jnp.int32(chips))
        row = lax.rem(block + turn, jnp.int32(chips)) * part_rows + in_part
        is_there = (turn < turns) & (in_part < part_rows) & (row < used)
        row = jnp.where(is_there, row, 0)
        source = lax.div(jnp.maximum(order[0][row], 0), jnp.int32(work.top_k)) if order else row
        return _Ticket(jnp.where(is_there, target[row], -1), source, [x[source] for x in numbers])

    def fetch(ticket: _Ticket, slot: int) -> None:
        """Begins to copy a row to a slot."""

        @pl.when(ticket.target >= 0)
        def _():
            for x, ring in zip(xs, rings, strict=True):
                row = x.at[ticket.source]
                in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                plgpu.copy_gmem_to_smem(row, ring.at[slot], full.at[slot], oob_mode=in_bounds)

    def send(ticket: _Ticket, slot: int) -> None:
        """Begins to copy the row of a slot to where it belongs, once it is there."""

        @pl.when(ticket.target >= 0)
        def _():
            peer = device_id(lax.div(ticket.target, jnp.int32(work.num_rows)), work.axes)
            place = lax.rem(ticket.target, jnp.int32(work.num_rows))
            for result, number in zip(results_of_numbers, ticket.numbers, strict=True):
                plgpu.remote_ref(result, peer)[place] = number
            plgpu.barrier_wait(full.at[slot])
            for result, ring in zip(results, rings, strict=True):
                plgpu.copy_smem_to_gmem(ring.at[slot], plgpu.remote_ref(result, peer).at[place], commit_group=False)

        plgpu.commit_smem_to_gmem_group()

    ahead = slots - work.lag

    def one_round(index, state):
        tickets, following = state
        tickets = list(tickets)
        for slot in range(slots):
            send(tickets[slot], slot)
            plgpu.wait_smem_to_gmem(work.lag, wait_read_only=True)  # so that the slot of `lag` turns ago is free
            free = (slot + ahead) % slots
            tickets[free] = following
            fetch(following, free)
            following = look_up(index * slots + slot + ahead + 1)  # a turn early: the tables are far away
        return tickets, following

    @pl.when(used > 0)
    def _():
        tickets = [look_up(jnp.int32(turn)) for turn in range(ahead)]
        for slot, ticket in enumerate(tickets):
            fetch(ticket, slot)
        following = look_up(jnp.int32(ahead))
        tickets += [following] * work.lag  # of empty slots, which are filled before their first turn
        lax.fori_loop(0, lax.div(turns + (slots - 1), jnp.int32(slots)), one_round, (tickets, following))

    plgpu.wait_smem_to_gmem(0)
    wait_for_all(done, block, work.num_blocks, work.axes)


def _as_sent(x: jax.Array, *, has_values: bool) -> jax.Array:
    """[N, H] with columns added so that a row can be copied in bulk; [N] of one number of 4 bytes beside values."""
    if has_values and x.shape[1] == 1 and x.dtype.itemsize == _NUMBER_BYTES:
        return x[:, 0]
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % (_COPY_BYTES // x.dtype.itemsize))))


def _rows_and_numbers(sent: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Those of `_as_sent` that are copied in bulk, and those that are a number a row."""
    return [x for x in sent if len(x.shape) == 2], [x for x in sent if len(x.shape) == 1]


def _as_it_was(x: jax.Array, like: jax.Array) -> jax.Array:
    """What `_as_sent` undoes, for rows like those of `like`."""
    return x[:, None] if x.ndim == 1 else x[:, : like.shape[1]]

"""The routes of rows to the experts' chips, worked out by all chips together, on NVIDIA GPUs.

One kernel does what would be a small collective and a dozen kernels of sums over what it brings:

    counts of each chip ──► every chip        a row of numbers for each peer
    counts [ep, E] ──► bases [E]              sums over experts and chips
    each choice: bases[expert] + its row in the plan by expert = its target
                 ──► its own address, to the target

Every block waits for the counts and sums them for itself: it takes less time than to tell each other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.all_to_all import reference
from pallas_kernels.all_to_all.device_id import device_id
from pallas_kernels.all_to_all.gpu.wait_for_all import wait_for_all
from pallas_kernels.all_to_all.routes import Routes
from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.on_gpu.strips import WARPGROUP
from pallas_kernels.plan import Plan

_MOST_BLOCKS = 132
_AT_ONCE = 8
"""Numbers that are loaded before the first of them is used."""


def make_routes(topk_ids: jax.Array, by_expert: Plan, num_rows: int, axes: tuple[str, ...]) -> tuple[Routes, jax.Array]:
    """See `pallas_kernels.all_to_all.make_routes`."""
    require_hopper("make_routes")
    chips, num_experts, num_choices = lax.axis_size(axes), by_expert.group_sizes.size, topk_ids.size
    if num_choices == 0 or num_rows == 0:
        return reference.make_routes(topk_ids, by_expert, num_rows, axes)
    if chips * max(num_rows, num_choices) >= 2**31:
        raise Unsupported(
            f"make_routes: the rows and the choices of all {chips} chips must each be fewer than 2³¹, got {num_rows} "
            f"rows and {num_choices} choices a chip"
        )
    padded = pl.cdiv(num_experts, WARPGROUP) * WARPGROUP
    num_blocks = max(chips, min(_MOST_BLOCKS, pl.cdiv(num_choices, _AT_ONCE)))
    by_expert_padded = [jnp.pad(x, (0, padded - num_experts)) for x in (by_expert.group_sizes, by_expert.offsets)]
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    numbers = plgpu.SMEM((padded,), jnp.int32)
    targets, addresses, sizes, arriving, _ = plgpu.kernel(
        functools.partial(_kernel, axes=axes, num_blocks=num_blocks),
        out_type=[
            ints((num_choices,)),
            ints((num_rows,)),
            ints((num_experts // chips,)),
            ints((1,)),
            ints((chips, padded)),
        ],
        scratch_types=[numbers, numbers],
        grid=(num_blocks,),
        grid_names=("block",),
        kernel_name="make_routes",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(lax.axis_index(axes)[None], topk_ids.reshape(-1), by_expert.inverse.reshape(-1), *by_expert_padded)
    return Routes(targets, addresses, jnp.int32(num_choices), arriving[0]), sizes


def _kernel(
    rank,
    ids,
    inverse,
    own_counts,
    offsets,
    targets,
    addresses,
    sizes,
    arriving,
    counts,
    totals,
    bases,
    *,
    axes,
    num_blocks,
) -> None:
    told, done = pl.get_global(plgpu.SemaphoreType.REGULAR), pl.get_global(plgpu.SemaphoreType.REGULAR)
    chips, block, me = lax.axis_size(axes), lax.axis_index("block"), rank[0]
    num_choices, num_rows, num_local = targets.shape[0], addresses.shape[0], sizes.shape[0]
    layout = plgpu.Layout.WG_STRIDED(totals.shape, vec_size=1)
    load = functools.partial(plgpu.load, layout=layout)

    @pl.when(block < chips)
    def _():
        peer = device_id(block, axes)
        plgpu.remote_ref(counts, peer)[me, :] = load(own_counts)
        pl.semaphore_signal(told, 1, device_id=peer)

    pl.semaphore_wait(told, chips, decrement=False)
    total = earlier = plgpu.layout_cast(jnp.zeros(totals.shape, jnp.int32), layout)
    for sender in range(chips):
        of_sender = load(counts.at[sender])
        total += of_sender
        earlier += jnp.where(sender < me, of_sender, 0)
    totals[...] = total
    bases[...] = earlier - load(offsets)  # from which on this chip counts its rows for an expert
    plgpu.commit_smem()

    for peer in range(chips):

        def add_experts(batch, before, peer=peer):
            """The experts of a chip, some at once: `before` are the rows that come before theirs there."""
            local = [batch * _AT_ONCE + i for i in range(_AT_ONCE)]
            expert = [peer * num_local + jnp.minimum(each, num_local - 1) for each in local]
            read = [(totals[each], bases[each]) for each in expert]
            for i, (size, so_far) in enumerate(read):

                @pl.when(local[i] < num_local)
                def _(i=i, size=size, so_far=so_far, before=before):
                    bases[expert[i]] = so_far + before + peer * num_rows

                    @pl.when((block == 0) & (me == peer))
                    def _():
                        sizes[local[i]] = size

                before += jnp.where(local[i] < num_local, size, 0)
            return before

        arrive = lax.fori_loop(0, pl.cdiv(num_local, _AT_ONCE), add_experts, jnp.int32(0))

        @pl.when((block == 0) & (me == peer))
        def _(arrive=arrive):
            arriving[0] = jnp.minimum(arrive, num_rows)

    plgpu.commit_smem()

    def choose(batch, _):
        choice = [(batch * num_blocks + block) * _AT_ONCE + i for i in range(_AT_ONCE)]
        clamped = [jnp.minimum(each, num_choices - 1) for each in choice]
        found = [(ids[each], inverse[each]) for each in clamped]
        base = [bases[jnp.maximum(expert, 0)] for expert, _ in found]
        for i, (_, row) in enumerate(found):
            target = base[i] + row
            peer = lax.div(target, jnp.int32(num_rows))

            @pl.when(choice[i] < num_choices)
            def _(i=i, row=row, target=target, peer=peer):
                targets[choice[i]] = jnp.where(row >= 0, target, -1)

                @pl.when(row >= 0)
                def _():
                    there = plgpu.remote_ref(addresses, device_id(peer, axes))
                    there[lax.rem(target, jnp.int32(num_rows))] = me * num_choices + choice[i]

    lax.fori_loop(0, pl.cdiv(num_choices, num_blocks * _AT_ONCE), choose, None)
    wait_for_all(done, block, num_blocks, axes)

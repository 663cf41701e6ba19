"""The list of experts that the choices hit, made by each block for itself while the weights' first copies wait for it.

A choice is the first of its expert if no choice before it is of the same one; the experts' places in the list are the
order of their first choices. All pairs of 64 choices are compared at once, in the registers of a warpgroup:

    choices             5  2  5  -  7
    first of its kind   x  x        x
    place in the list   0  1  0     2       -> experts [5, 2, 7]
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, along_columns, along_rows, iota
from pallas_kernels.routed_mlp.gpu.scratch import Scratch
from pallas_kernels.routed_mlp.gpu.sizes import CHOICES, Inputs, Sizes

_AT_ONCE = 32  # scalars whose latencies pass together


def list_hits(inputs: Inputs, scratch: Scratch, sizes: Sizes) -> None:
    """Writes `experts`, `num_hits` and `token_weights` of the scratch, and arrives at `listed`."""
    _copy_choices(inputs, scratch, sizes)
    ids, numbers = scratch.choice_ids, scratch.choice_numbers
    choice, other = iota(0), iota(1)
    expert = along_rows(plgpu.load(ids, layout=ROWS))
    other_expert = along_columns(plgpu.load(ids, layout=COLUMNS))
    # For each choice the first of its expert; what is no choice comes after all.
    is_choice = (expert >= 0) & (expert < inputs.gate_up.shape[0])
    first = jnp.min(jnp.where((expert == other_expert) & is_choice, other, CHOICES), axis=1)
    numbers[...] = first
    plgpu.commit_smem()
    is_first = along_columns(plgpu.load(numbers, layout=COLUMNS)) == other
    place = jnp.sum(jnp.where(is_first & (other < along_rows(first)), 1, 0), axis=1)
    num_hits = jnp.sum(jnp.where(is_first, 1, 0), axis=1)
    plgpu.commit_smem()  # all have been read
    numbers[...] = place
    scratch.num_hits[...] = num_hits
    plgpu.commit_smem()

    # Rows are places of the list now, columns choices.
    is_there = along_columns(plgpu.load(numbers, layout=COLUMNS)) == choice
    scratch.experts[...] = jnp.sum(jnp.where(is_there & is_first, other_expert, 0), axis=1)
    weight = along_columns(plgpu.load(scratch.choice_weights, layout=COLUMNS))
    token = lax.div(other, jnp.int32(sizes.top_k))
    for t in range(sizes.num_tokens):
        # All that it gives an expert, in case that it has chosen it twice.
        scratch.token_weights[t] = jnp.sum(jnp.where(is_there & (token == t), weight, 0.0), axis=1)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.listed)


def _copy_choices(inputs: Inputs, scratch: Scratch, sizes: Sizes) -> None:
    """The choices and their weights in shared memory; −1 past them."""
    ids, weights = scratch.choice_ids, scratch.choice_weights
    if sizes.most_hits == CHOICES:
        ids[...] = plgpu.load(inputs.ids, layout=ROWS, optimized=False)
        weights[...] = plgpu.load(inputs.weights, layout=ROWS, optimized=False)
        plgpu.commit_smem()
        return
    ids[...] = plgpu.layout_cast(jnp.full((CHOICES,), -1), ROWS)
    weights[...] = plgpu.layout_cast(jnp.full((CHOICES,), 0.0), ROWS)
    plgpu.commit_smem()
    for begin in range(0, sizes.most_hits, _AT_ONCE):
        some = range(begin, min(begin + _AT_ONCE, sizes.most_hits))
        for i, expert, weight in [(i, inputs.ids[i], inputs.weights[i]) for i in some]:
            ids[i] = expert
            weights[i] = weight
    plgpu.commit_smem()

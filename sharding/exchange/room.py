"""How many rows a chip has room for, and how many rounds an exchange can need because of that.

Shapes are static, while the load varies. A chip that had room for all that its peers could ever send it would hold ep
times its share, so it has room for some of it, and an exchange runs in rounds, as many as the load needs.
"""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.plan import Plan
from sharding.exchange.way import Way


def slab_and_rounds(shape: tuple[int, ...], way: Way, *, choices: int | None = None) -> tuple[int, int]:
    """`fit_slab` for the [T, K] choices of a chip, and those of the chips that share the width of its experts.

    Args:
      shape: [T, K].
      way: how rows travel.
      choices: how many of the choices are made on average; None for `usual_choices`.
    """
    axes, (num_tokens, top_k) = way.axes, shape
    max_rows = None if way.max_rows is None else axes.tp * way.max_rows
    choices, num_local = usual_choices(shape, way) if choices is None else choices, way.placement.num_local
    return fit_slab(axes.tp * num_tokens, top_k, num_local, axes.ep, max_rows, choices=choices, slab=way.slab)


def usual_choices(shape: tuple[int, ...], way: Way) -> int:
    """How many of the [T, K] choices of a chip, and of those that share its experts' width, are made on average."""
    axes, (num_tokens, top_k) = way.axes, shape
    choices = axes.tp * num_tokens * top_k
    if (most := way.counted_choices) is None:
        return choices
    groups = axes.size(tuple(dict.fromkeys((*axes.tokens, *axes.mlp)))) // axes.tp
    return min(choices, max(1, -(-most // groups)))  # evenly over the groups


def fit_slab(
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    ep: int,
    max_rows: int | None,
    *,
    choices: int | None = None,
    slab: int | None = None,
) -> tuple[int, int]:
    """S, where a rank has room for ep slabs of S rows in a round; and the most rounds that any load can need.

    A slab holds twice the rows that one rank has for another where the load is balanced, in multiples of 8. Where that
    is not far from all that it could ever have, it holds all of it and one round will do. A balanced load is T·K
    choices, or `choices` where many of the T·K are not made. An expert gets at most `max_rows` from one rank, if that
    is not None. A `slab` that is given is taken.
    """
    worst = num_tokens * top_k
    if max_rows is not None:
        worst = min(worst, num_local_experts * max_rows)
    if slab is None:
        balanced = num_tokens * top_k if choices is None else choices
        twice_balanced = 8 * math.ceil(2 * balanced / ep / 8)
        slab = worst if worst <= 2 * twice_balanced else twice_balanced
    return slab, math.ceil(worst / slab) if worst > slab else 1


def bounded(plan: Plan, way: Way) -> Plan:
    """A tight plan with no more rows than choices that are made; the same plan if nothing is known of them."""
    if (most := way.counted_choices) is None:
        return plan
    # Rows in use lie first, so that these hold every choice.
    inverse = jnp.where(plan.inverse < most, plan.inverse, -1)
    return dataclasses.replace(plan, order=plan.order[:most], inverse=inverse)

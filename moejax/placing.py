"""Hot experts in several places: which slots hold which expert, and how weights get there.

    experts = balance(load, num_slots=288, ep=32)     # load: aux.load.tokens_per_expert of what was served, added up
    params = place(params, experts)                   # 256 experts in 288 slots, the hottest of them in several
    y, aux = moe(x, params, config, mesh=mesh)        # as before: the same y, the same choices, another spread

The arrangement is data and goes with the weights, so another one of as many slots compiles nothing anew.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax.params import EXPERT_FIELDS, MoEParams
from sharding.mesh import has_explicit_axes
from sharding.replicas import Replicas
from sharding.ring import take_over_ring


def place(params: MoEParams, experts: Any) -> MoEParams:
    """The same layer with its experts in other slots.

    Args:
      params: of a layer, placed or not; 8-bit weights too.
      experts: int [P], known (outside jit): the expert of each slot, as `balance` plans them. Over ep chips, chip r
        holds the slots [r·P/ep, (r+1)·P/ep). Experts in order, each once, are a layer without replicas.

    Returns:
      MoEParams whose experts' weights have the leading dimension P. A gradient through `place` adds up over the
      replicas of an expert; parameters that are trained where they lie need `add_up_replicas`.

    Raises:
      ValueError: `experts` are no numbers of experts, an expert has no slot, or the chips that share the weights cannot
        share the slots evenly.
    """
    if not isinstance(params, MoEParams):
        raise TypeError(f"params must be MoEParams, got {type(params).__name__}")
    num_experts = params.down.shape[0] if params.replicas is None else params.replicas.count.shape[0]
    replicas = Replicas.of(experts, num_experts)
    sources = replicas.experts if params.replicas is None else params.replicas.holders(replicas.experts)
    is_plain = np.array_equal(np.asarray(experts), np.arange(num_experts))

    own = {name: jax.tree.map(lambda leaf: _moved(leaf, sources), getattr(params, name)) for name in EXPERT_FIELDS}
    return dataclasses.replace(params, **own, replicas=None if is_plain else replicas)


def _moved(leaf: jax.Array, sources: jax.Array) -> jax.Array:
    """leaf[sources], split over chips as `leaf` is, where that is known."""
    sharding: Any = jax.typeof(leaf).sharding
    if not has_explicit_axes(sharding.mesh):
        sharding = None if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return leaf[sources]
    return take_over_ring(leaf, sources, sharding)


def add_up_replicas(gradients: MoEParams, params: MoEParams) -> MoEParams:
    """The gradients of placed `params` with those of an expert's replicas added up, the same for each of them.

    Replicas that start equal and get equal gradients stay equal.
    """
    if params.replicas is None:
        return gradients
    add_up = params.replicas.add_up
    return dataclasses.replace(
        gradients, **{name: jax.tree.map(add_up, getattr(gradients, name)) for name in EXPERT_FIELDS}
    )

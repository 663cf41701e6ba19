"""Hot experts in several places: which slots hold which expert, and how weights get there.

    experts = balance(load, num_slots=288, ep=32)     # load: aux.load.tokens_per_expert of what was served, added up
    params = place(params, experts)                   # 256 experts in 288 slots, the hottest of them in several
    y, aux = moe(x, params, config, mesh=mesh)        # as before: the same y, the same choices, another spread

The arrangement is data and goes with the weights, so another one of as many slots compiles nothing anew.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
      replicas of an expert. Where `params` lie is kept, and weights move around a ring of chips: outside jit, and under
      it on axes of type Explicit; on other axes XLA decides.

    Raises:
      ValueError: `experts` are no numbers of experts, an expert has no slot, or the chips that share the weights cannot
        share the slots evenly.
    """
    _require_params(params=params)
    if len(params.down.shape) != 3:
        raise ValueError(
            f"params must be of one layer, down [E, I, H], got {list(params.down.shape)}; of stacked layers: "
            "jax.vmap(lambda layer: place(layer, experts))(params)"
        )
    if isinstance(experts, jax.core.Tracer):
        raise ValueError("experts must be known: call place outside jit, or close over a NumPy array")
    num_experts = params.down.shape[0] if params.replicas is None else params.replicas.num_experts
    replicas = Replicas.of(experts, num_experts)
    sources = replicas.experts if params.replicas is None else params.replicas.holders(replicas.experts)
    is_plain = np.array_equal(np.asarray(experts), np.arange(num_experts))

    own = {
        name: jax.tree.map(lambda leaf: _moved(jnp.asarray(leaf), sources), getattr(params, name))
        for name in EXPERT_FIELDS
    }
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

    Replicas that start equal and get equal gradients stay equal. To train the experts where they lie, differentiate for
    their arrays, as `replicas` are whole numbers:

        def loss(weights): return loss_of(dataclasses.replace(params, **weights))
        gradients = jax.grad(loss)({"gate_up": params.gate_up, "down": params.down})
        gradients = add_up_replicas(dataclasses.replace(params, **gradients), params)

    Raises:
      TypeError: one of the two is no MoEParams.
      ValueError: the gradients are not those of `params`.
    """
    _require_params(gradients=gradients, params=params)
    if gradients.down.shape != params.down.shape:
        raise ValueError(f"gradients must be those of params, down {params.down.shape}, got {gradients.down.shape}")
    if params.replicas is None:
        return gradients
    add_up = params.replicas.add_up
    return dataclasses.replace(
        gradients, **{name: jax.tree.map(add_up, getattr(gradients, name)) for name in EXPERT_FIELDS}
    )


def _require_params(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, MoEParams):
            raise TypeError(f"{name} must be MoEParams, got {type(value).__name__}")

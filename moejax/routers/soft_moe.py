"""Soft-MoE (Puigcerver et al. 2023, arXiv 2308.00951): experts work on mixtures of tokens, and nothing is chosen.

For each sequence of N tokens, with S slots an expert and Φ of shape [H, E·S]:

    logits = scale · l2(x) · l2(Φ)              [N, E·S]
    slots  = softmax over tokens(logits)ᵀ · x    [E·S, H], S for each expert
    y      = softmax over slots(logits) · expert(slots)

Every expert has equally many rows, none is dropped, and all of it is differentiable. **Not causal**: a slot mixes the
tokens of the whole sequence, later ones too. A language model trained so sees what it has to predict; compare its
loss with nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.functional import MoEAux, moe_experts
from moejax.layer import new_param
from moejax.losses import LoadStats
from moejax.routers.base import Router, plain_choice
from moejax.routers.layer import RoutedMoE, refuse_scaled_inputs, without_capacity
from sharding.exchange_plan import expert_capacity
from sharding.mesh import AnyMesh

_TYPICAL_LENGTH = 256
_SMALLEST_SQUARE = 1e-12


class SlotRouter(Router):
    """The parameters of Soft-MoE's mixing; it decides nothing, so that only `SoftMoE` can use it.

    Attributes:
      phi: nnx.Param [H, E, S].
      scale: nnx.Param [1], of the logits.
      slots_per_expert: S.
    """

    causal = False

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, slots_per_expert: int, mesh: Mesh | None = None):
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert must be at least 1, got {slots_per_expert}")
        super().__init__(config)
        self.slots_per_expert = slots_per_expert
        shape = (config.hidden_size, config.num_experts, slots_per_expert)
        initializer = nnx.initializers.normal(config.hidden_size**-0.5)
        self.phi = new_param(initializer, shape, config.param_dtype, rngs=rngs, mesh=mesh)
        self.scale = new_param(nnx.initializers.ones, (1,), config.param_dtype, rngs=rngs, mesh=mesh)

    def logits(self, x: jax.Array) -> jax.Array:
        """X [B, N, H] -> float32 [B, N, E, S]."""
        phi = _unit(self.phi[...].astype(jnp.float32), axis=0) * self.scale[...].astype(jnp.float32)
        return jnp.einsum("bnh,hes->bnes", _unit(x, axis=-1), phi, precision=jax.lax.Precision.HIGHEST)


class SoftMoE(RoutedMoE):
    """`RoutedMoE` whose experts get slots instead of tokens. A shared expert gets tokens, as everywhere.

    `aux.load` counts slots; `aux.losses` is empty.
    """

    router: SlotRouter

    def forward(
        self, x: jax.Array, token_ids: jax.Array | None, key: jax.Array | None, mesh: AnyMesh | None
    ) -> tuple[jax.Array, MoEAux]:
        """See `RoutedMoE.forward`."""
        config = self.config
        tokens = x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])
        logits = self.router.logits(tokens.astype(jnp.float32))
        tokens = tokens.astype(config.dtype)
        num_sequences, _, num_experts, num_slots = logits.shape
        dispatch = jax.nn.softmax(logits, axis=1).astype(config.dtype)
        collect = jax.nn.softmax(logits, axis=(2, 3)).astype(config.dtype)
        slots = _product("bnes,bnh->besh", dispatch, tokens)
        experts = jnp.arange(num_experts, dtype=jnp.int32)[:, None, None]
        slot_ids = jnp.broadcast_to(experts, (*slots.shape[:-1], 1))
        outputs, _ = moe_experts(
            slots.astype(config.dtype),
            jnp.ones(slot_ids.shape, jnp.float32),
            slot_ids,
            dataclasses.replace(self.expert_params(), shared_gate_up=None, shared_down=None),
            dataclasses.replace(config, shared_intermediate_size=0),
            mesh=mesh,
            expert_axis=self.expert_axis,
        )
        y = _product("bnes,besh->bnh", collect, outputs)
        if config.shared_intermediate_size:
            y += self._shared_expert(tokens, mesh)
        load = jnp.full(num_experts, num_sequences * num_slots, jnp.int32)
        return y.reshape(x.shape).astype(x.dtype), MoEAux({}, LoadStats(load, jnp.zeros_like(load)))

    def _shared_expert(self, tokens: jax.Array, mesh: AnyMesh | None) -> jax.Array:
        """What the shared expert makes of tokens [B, N, H], float32: a layer in which no routed expert is chosen."""
        no_choice = jnp.full((*tokens.shape[:-1], 1), -1, jnp.int32)
        y, _ = moe_experts(
            tokens,
            jnp.zeros(no_choice.shape, jnp.float32),
            no_choice,
            self.expert_params(),
            self.config,
            max_choices=1,
            mesh=mesh,
            expert_axis=self.expert_axis,
        )
        return y.astype(jnp.float32)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of operands of one dtype, summed in float32."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """`x` scaled to length 1 along `axis`; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(axis, keepdims=True), _SMALLEST_SQUARE))


def soft_moe(
    config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, slots_per_expert: int | None = None
) -> SoftMoE:
    """Soft-MoE, with no losses.

    Args:
      config: the layer; of its routing only top_k and capacity_factor (default 1) play a part, and only for the default
        of slots_per_expert.
      rngs: initialises.
      mesh: default is that of `jax.set_mesh`, if any.
      slots_per_expert: S. By default a sequence has as many slots as 256 tokens have choices, ⌈capacity_factor ·
        256 · K / E⌉ for each expert. The cost of a sequence does not depend on its length: with sequences of N tokens
        take N in the place of 256 to spend what top-k routing does.

    Raises:
      ValueError: slots_per_expert is not positive, or `config` scales inputs instead of outputs.
    """
    refuse_scaled_inputs(config, "soft_moe")
    config = plain_choice(config)
    if slots_per_expert is None:
        factor = 1.0 if config.capacity_factor is None else config.capacity_factor
        slots_per_expert = expert_capacity(_TYPICAL_LENGTH, config.top_k, config.num_experts, factor)
    router = SlotRouter(config, rngs=rngs, mesh=mesh, slots_per_expert=slots_per_expert)
    return SoftMoE(without_capacity(config), router, rngs=rngs, mesh=mesh)

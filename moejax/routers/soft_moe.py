"""Soft-MoE (Puigcerver et al. 2023, arXiv 2308.00951): experts work on mixtures of tokens, and nothing is chosen.

For each sequence of N tokens, with S slots an expert and Φ of shape [H, E·S]:

    logits = scale · l2(x) · l2(Φ)              [N, E·S]
    slots  = softmax over tokens(logits)ᵀ · x    [E·S, H], S for each expert
    y      = softmax over slots(logits) · expert(slots)

Every expert has equally many rows, none is dropped, and all of it is differentiable. **Not causal**: a slot mixes the
tokens of the whole sequence, including later ones. A language model that is trained this way sees what it has to
predict, so its loss cannot be compared with that of any other.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.checks import require, require_integer
from moejax.losses import LoadStats
from moejax.param import Param
from moejax.router import lowest
from moejax.routers.base import Experts, Given, Outcome, Params, Router
from sharding.exchange.capacity import expert_capacity
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig

_TYPICAL_LENGTH = 256
_SMALLEST_SQUARE = 1e-12


@dataclasses.dataclass(frozen=True)
class SoftRouter(Router):
    """Soft-MoE, with no losses: experts get slots instead of tokens. A shared expert gets tokens, as everywhere.

    `aux.load` counts slots; `aux.topk_ids` is empty. A chip works on whole sequences.

    Attributes:
      slots_per_expert: S. By default a sequence has as many slots as 256 tokens have choices, ⌈256 · K / E⌉ for each
        expert. The cost of a sequence does not depend on its length: for sequences of N tokens, put N instead of 256
        into the formula to spend as much as top-k routing does.
    """

    causal = False
    replays = False
    whole_sequences = True

    slots_per_expert: int | None = None

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        if self.slots_per_expert is not None:
            require_integer("slots_per_expert", self.slots_per_expert, at_least=1)

    def check_layer(self, config: "MoEConfig") -> None:
        """See `Router.check_layer`."""
        self.refuse_scaled_inputs(config)
        expected = "None with SoftRouter, whose experts have slots"
        require(config.capacity_factor is None, "capacity_factor", expected, config.capacity_factor)

    def slots(self, config: "MoEConfig") -> int:
        """S."""
        if self.slots_per_expert is not None:
            return self.slots_per_expert
        return expert_capacity(_TYPICAL_LENGTH, config.top_k, config.num_experts, 1.0)

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """Φ [H, E, S], and the scale [1] of the logits."""
        shape = (config.hidden_size, config.num_experts, self.slots(config))
        return {
            "phi": Param(shape, ("embed", None, None), "router kernel", _normal(config.hidden_size**-0.5)),
            "scale": Param((1,), (None,), "scalar", nnx.initializers.ones),
        }

    def apply(
        self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given, experts: Experts
    ) -> tuple[jax.Array, Outcome]:
        """See `Router.apply`."""
        by_sequence = (-1, tokens.sequence_length)
        inputs = x.reshape(*by_sequence, x.shape[1])
        logits = _logits(inputs.astype(jnp.float32), params)
        real = jnp.ones(x.shape[:1], bool) if tokens.real is None else tokens.real
        real = real.reshape(*by_sequence, 1, 1)
        num_sequences, _, num_experts, num_slots = logits.shape
        # A sequence without a token gives slots of zeros.
        dispatch = jax.nn.softmax(jnp.where(real, logits, lowest(logits.dtype)), axis=1)
        dispatch = jnp.where(real, dispatch, 0).astype(config.dtype)
        collect = jax.nn.softmax(logits, axis=(2, 3)).astype(config.dtype)
        slots = _product("bnes,bnh->besh", dispatch, inputs).astype(config.dtype).reshape(-1, x.shape[1])
        has_tokens = real.any(1)[:, None]  # [B, 1, 1, 1]
        ids = jnp.arange(num_experts, dtype=jnp.int32)[None, :, None, None]
        ids = jnp.where(has_tokens, ids, -1)
        ids = jnp.broadcast_to(ids, (num_sequences, num_experts, num_slots, 1)).reshape(-1, 1)
        ones = jnp.ones(ids.shape, jnp.float32)
        outputs, dropped = experts(slots, ones, ids, tokens, with_shared=False, limited=False)
        y = _product("bnes,besh->bnh", collect, outputs.reshape(num_sequences, num_experts, num_slots, -1))
        y = y.reshape(x.shape)
        if (shared := experts.shared(x)) is not None:
            y += shared
        load = tokens.sum(jnp.broadcast_to(has_tokens.sum(dtype=jnp.int32) * num_slots, (num_experts,)))
        nothing = x.shape[0], 0
        return y, Outcome(jnp.zeros(nothing, jnp.int32), jnp.zeros(nothing, jnp.float32), {}, LoadStats(load, dropped))


_normal = functools.cache(nnx.initializers.normal)
"""One initialiser for each scale, as programs that make parameters are kept by it."""


def _logits(x: jax.Array, params: Params) -> jax.Array:
    """Of x [B, N, H], float32 [B, N, E, S]."""
    phi = _unit(params["phi"].astype(jnp.float32), axis=0) * params["scale"].astype(jnp.float32)
    return jnp.einsum("bnh,hes->bnes", _unit(x, axis=-1), phi, precision=jax.lax.Precision.HIGHEST)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of operands of one dtype, summed in float32."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """`x` scaled to length 1 along `axis`; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(axis, keepdims=True), _SMALLEST_SQUARE))

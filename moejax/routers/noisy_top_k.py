"""Noisy top-k gating with the importance and load losses.

Shazeer et al. 2017 (arXiv 1701.06538), sections 2.1 and 4:

    H = x · W + N(0, 1) · softplus(x · W_noise)        noise while training only
    gates = softmax of the K largest of H, 0 elsewhere
    loss = w · CV²(Σ_t gates) + w · CV²(Σ_t P)         P: probability to be chosen under new noise
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moejax.checks import require_number
from moejax.losses import importance_loss, router_losses
from moejax.param import Param
from moejax.router import Routing, forced, poison, without
from moejax.routers.base import ZEROS, Decision, Given, Params, Router, gate_logits, gate_table
from pallas_kernels.top_k import top_k
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig

_SMALLEST_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True)
class NoisyTopKRouter(Router):
    """Shazeer's gate, both of its maps zero at first: all experts then have an equal chance while training.

    Attributes:
      routed_scaling_factor: the weights are multiplied by this.
      router_bias: whether the gate has a bias.
      importance_loss: weight of the importance loss.
      load_loss: weight of the load loss.
      sequence_balance_loss: weight of DeepSeek-V3's loss per sequence.
      z_loss: weight of the router z-loss.
    """

    noisy = True

    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    importance_loss: float = 0.1
    load_loss: float = 0.1
    sequence_balance_loss: float = 0.0
    z_loss: float = 0.0

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        require_number("routed_scaling_factor", self.routed_scaling_factor)

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """See `Router.table`."""
        return gate_table(config, bias=self.router_bias, init=ZEROS) | gate_table(
            config, bias=False, name="noise_kernel", init=ZEROS
        )

    def route(self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given) -> Decision:
        """The K largest logits, with noise if `given.key` is there."""
        num_experts, k = config.num_experts, config.top_k
        clean = gate_logits(x, params["kernel"], params.get("bias"))
        deviation = jnp.maximum(jax.nn.softplus(gate_logits(x, params["noise_kernel"])), _SMALLEST_DEVIATION)
        noisy = clean
        if given.key is not None:
            noisy += noise_of_tokens(given.key, tokens, num_experts) * deviation
        # One more than K, which an expert has to beat to stay.
        best, ids = top_k(noisy, min(k + 1, num_experts), backend=config.backend)
        topk_ids, chosen_logits = ids[:, :k], best[:, :k]
        if given.topk_ids is not None:
            _, free = top_k(without(noisy, given.topk_ids), k, backend=config.backend)
            topk_ids = forced(free, given.topk_ids)
            chosen_logits = jnp.take_along_axis(noisy, topk_ids, axis=1)
        weights = jax.nn.softmax(chosen_logits)
        chosen = topk_ids[:, :, None] == jnp.arange(num_experts)
        losses = {}
        if self.importance_loss:
            gates = jnp.where(chosen, weights[:, :, None], 0).sum(1)
            losses["importance"] = self.importance_loss * importance_loss(gates, tokens)
        if self.load_loss:
            likely = _probability_of_choice(clean, deviation, best, chosen.any(1), k)
            losses["load"] = self.load_loss * importance_loss(likely, tokens)
        weights *= self.routed_scaling_factor * poison(clean)
        routing = Routing(topk_ids, weights, jax.nn.softmax(clean), clean)
        others = router_losses(routing, tokens, sequence_balance=self.sequence_balance_loss, z=self.z_loss)
        return Decision(routing, losses | others)


def noise_of_tokens(key: jax.Array, tokens: Tokens, width: int) -> jax.Array:
    """Standard normal float32 [T, width], by the place of each token in the batch: the same on every mesh."""
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(tokens.index)
    return jax.vmap(lambda key: jax.random.normal(key, (width,), jnp.float32))(keys)


def _probability_of_choice(
    clean: jax.Array, deviation: jax.Array, best: jax.Array, chosen: jax.Array, top_k: int
) -> jax.Array:
    """float32 [T, E], equations 8 and 9: Φ((clean − the K-th best of the others) / deviation).

    Args:
      clean: [T, E] logits without noise.
      deviation: [T, E] of the noise.
      best: [T, K + 1] the largest logits with noise, best first.
      chosen: bool [T, E].
      top_k: K.
    """
    if top_k == clean.shape[1]:
        return jnp.ones_like(clean)
    others = jnp.where(chosen, best[:, top_k, None], best[:, top_k - 1, None])
    return jax.scipy.stats.norm.cdf((clean - others) / deviation)

"""Noisy top-k gating with the importance and load losses.

Shazeer et al. 2017 (arXiv 1701.06538), sections 2.1 and 4:

    H = x · W + N(0, 1) · softplus(x · W_noise)        noise while training only
    gates = softmax of the K largest of H, 0 elsewhere
    loss = w · CV²(Σ_t gates) + w · CV²(Σ_t P)         P: probability to be chosen under new noise
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.losses import importance_loss, router_losses
from moejax.router import Routing, poison
from moejax.routers.base import Batch, Decision, Gate, Router, or_default, plain_choice
from moejax.routers.layer import RoutedMoE
from pallas_kernels.top_k import top_k

_SMALLEST_DEVIATION = 1e-6


class NoisyTopK(Router):
    """Shazeer's gate.

    Attributes:
      gate, noise_gate: the linear maps W and W_noise, both zero at first, as in the paper: all experts then have an
        equal chance while training.
    """

    noisy = True

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        super().__init__(config)
        self.gate = Gate(config, rngs=rngs, mesh=mesh, initializer=nnx.initializers.zeros)
        without_bias = dataclasses.replace(config, router_bias=False)
        self.noise_gate = Gate(without_bias, rngs=rngs, mesh=mesh, initializer=nnx.initializers.zeros)

    def __call__(self, x: jax.Array, batch: Batch) -> Decision:
        """The K largest logits, with noise if `batch.key` is there."""
        config, tokens = self.config, batch.tokens
        clean = self.gate(x)
        deviation = jnp.maximum(jax.nn.softplus(self.noise_gate(x)), _SMALLEST_DEVIATION)
        noisy = clean
        if batch.key is not None:
            noisy += jax.random.normal(batch.key, clean.shape, jnp.float32) * deviation
        # One more than K, which an expert has to beat to stay.
        best, ids = top_k(noisy, min(config.top_k + 1, config.num_experts), backend=batch.backend)
        topk_ids = ids[:, : config.top_k]
        weights = jax.nn.softmax(best[:, : config.top_k])
        chosen = topk_ids[:, :, None] == jnp.arange(config.num_experts)
        losses = {
            "importance": importance_loss((weights[:, :, None] * chosen).sum(1), tokens),
            "load": importance_loss(_probability_of_choice(clean, deviation, best, chosen.any(1), config), tokens),
        }
        losses = {name: config.load_balance_loss * loss for name, loss in losses.items()}
        weights *= config.routed_scaling_factor * poison(clean)
        routing = Routing(topk_ids, weights, jax.nn.softmax(clean), clean)
        others = dataclasses.replace(config, load_balance_loss=0.0)
        return Decision(routing, losses | router_losses(routing, others, tokens))


def _probability_of_choice(
    clean: jax.Array, deviation: jax.Array, best: jax.Array, chosen: jax.Array, config: MoEConfig
) -> jax.Array:
    """float32 [T, E], equations 8 and 9: Φ((clean − the K-th best of the others) / deviation).

    Args:
      clean: [T, E] logits without noise.
      deviation: [T, E] of the noise.
      best: [T, K + 1] the largest logits with noise, best first.
      chosen: bool [T, E].
      config: top_k.
    """
    if config.top_k == config.num_experts:
        return jnp.ones_like(clean)
    others = jnp.where(chosen, best[:, config.top_k, None], best[:, config.top_k - 1, None])
    return jax.scipy.stats.norm.cdf((clean - others) / deviation)


def noisy_top_k(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None) -> RoutedMoE:
    """Noisy top-k; load_balance_loss of `config` weighs both of its losses, 0.1 (the paper's) if it has none."""
    config = or_default(plain_choice(config, normalize_topk=True), load_balance_loss=0.1)
    return RoutedMoE(config, NoisyTopK(config, rngs=rngs, mesh=mesh), rngs=rngs, mesh=mesh)

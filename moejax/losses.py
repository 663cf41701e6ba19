"""Losses that keep routers balanced, and the statistics of the load they make.

All are taken over the tokens of every chip: sums are made locally and added over the mesh axes that split the tokens.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.router import Routing
from sharding.tokens import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoadStats:
    """How evenly the tokens fell on the experts.

    Attributes:
      tokens_per_expert: int32 [E], assignments before anything is dropped.
      dropped_per_expert: int32 [E], assignments for which the expert had no room.
      unrouted: int32 [], tokens without any assignment, such as those that no expert took in expert choice. Masked
        positions do not count.
    """

    tokens_per_expert: jax.Array
    dropped_per_expert: jax.Array
    unrouted: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))

    @property
    def dropped(self) -> jax.Array:
        """int32 []: assignments dropped."""
        return self.dropped_per_expert.sum()

    @property
    def dropped_fraction(self) -> jax.Array:
        """float32 []: dropped share of all assignments."""
        return self.dropped / jnp.maximum(self.tokens_per_expert.sum(), 1)

    @property
    def cv(self) -> jax.Array:
        """float32 []: coefficient of variation, standard deviation over mean; 0 when balanced."""
        load = self.tokens_per_expert.astype(jnp.float32)
        return load.std() / jnp.maximum(load.mean(), jnp.finfo(jnp.float32).tiny)

    @property
    def entropy(self) -> jax.Array:
        """float32 []: entropy of the load over its maximum ln E; 1 when balanced, 0 when one expert takes all."""
        load = self.tokens_per_expert.astype(jnp.float32)
        share = load / jnp.maximum(load.sum(), 1)
        return jax.scipy.special.entr(share).sum() / jnp.log(jnp.maximum(load.size, 2))


def tokens_per_expert(topk_ids: jax.Array, num_experts: int, tokens: Tokens) -> jax.Array:
    """int32 [E]: assignments over all chips, of topk_ids [T, K]."""
    return tokens.sum(_choices(topk_ids, num_experts, tokens).sum(0, dtype=jnp.int32))


def router_losses(
    routing: Routing, tokens: Tokens, *, load_balance: float = 0.0, sequence_balance: float = 0.0, z: float = 0.0
) -> dict[str, jax.Array]:
    """The losses whose weight is not 0, each multiplied by its weight, float32 [].

    Returns:
      A dict with some of the keys "load_balance", "sequence_balance", "z".
    """
    losses = {}
    if load_balance:
        losses["load_balance"] = load_balance * load_balance_loss(routing, tokens)
    if sequence_balance:
        losses["sequence_balance"] = sequence_balance * sequence_balance_loss(routing, tokens)
    if z:
        losses["z"] = z * z_loss(routing, tokens)
    return losses


def load_balance_loss(routing: Routing, tokens: Tokens) -> jax.Array:
    """E · Σ_e f_e · P_e, f_e the share of assignments and P_e the mean probability of expert e; 1 when balanced.

    Switch Transformer (arXiv 2101.03961), equation 4, with f over all K choices.
    """
    num_experts, top_k = routing.scores.shape[1], routing.topk_ids.shape[1]
    choices = _choices(routing.topk_ids, num_experts, tokens)
    load = tokens.sum(choices.sum(0, dtype=jnp.float32)) / (tokens.count * top_k)
    probability = tokens.sum(_probabilities(routing, tokens).sum(0)) / tokens.count
    return num_experts * (jax.lax.stop_gradient(load) * probability).sum()


def sequence_balance_loss(routing: Routing, tokens: Tokens) -> jax.Array:
    """The load-balance loss of each sequence on its own, averaged over sequences; 1 when all are balanced.

    DeepSeek-V3 (arXiv 2412.19437), equations 17–20, scores normalised over the experts. A sequence may lie on
    several chips. Sequences without a token do not count.
    """
    num_experts, top_k = routing.scores.shape[1], routing.topk_ids.shape[1]
    length: Any = tokens.sequence_length
    sequences: Any = tokens.num_sequences
    if tokens.real is not None:
        length = tokens.per_sequence(jnp.ones((tokens.index.shape[0], 1)))
        sequences = jnp.maximum((length > 0).sum(dtype=jnp.float32), 1)
        length = jnp.maximum(length, 1)
    load = tokens.per_sequence(_choices(routing.topk_ids, num_experts, tokens)) / (length * top_k)
    probability = tokens.per_sequence(_probabilities(routing, tokens)) / length
    return num_experts * (jax.lax.stop_gradient(load) * probability).sum() / sequences


def z_loss(routing: Routing, tokens: Tokens) -> jax.Array:
    """Mean of (log Σ_e exp logit_e)², which keeps logits small. ST-MoE (arXiv 2202.08906), equation 5."""
    z = jax.nn.logsumexp(routing.logits, axis=1) ** 2
    return tokens.sum(tokens.keep(z).sum()) / tokens.count


def importance_loss(gates: jax.Array, tokens: Tokens) -> jax.Array:
    """The squared coefficient of variation of the experts' total weight; 0 when balanced.

    Shazeer et al. 2017 (arXiv 1701.06538), equations 6 and 7. The same of the smooth load is their load loss,
    equations 10 and 11.

    Args:
      gates: float32 [T, E], what each token gives to each expert: its weight (0 where not chosen), or the probability
        of choosing it under noise.
      tokens: which tokens they are.
    """
    total = tokens.sum(tokens.keep(gates).sum(0))
    # Large enough to divide by twice, as the gradient does.
    return total.var() / jnp.maximum(total.mean() ** 2, 1e-12)


def specialization_loss(probabilities: jax.Array, tokens: Tokens) -> jax.Array:
    """1 − I(token; expert) / ln E, float32 []: 0 when each token is sure of one expert and all are used alike.

    The mutual information I = H(mean of p) − mean of H(p) is large when experts are sharply divided among tokens and
    no expert is left out. It is 0, and the loss 1, when all tokens have the same p, spread or collapsed.

    Args:
      probabilities: float32 [T, E], rows that sum to 1.
      tokens: which tokens they are.
    """
    p = tokens.keep(probabilities)
    mean = tokens.sum(p.sum(0)) / tokens.count
    of_mean = _entropy(mean)
    of_each = tokens.sum(_entropy(p)) / tokens.count
    return 1 - (of_mean - of_each) / math.log(max(p.shape[1], 2))


def _entropy(p: jax.Array) -> jax.Array:
    """−Σ p ln p, with a finite gradient where p is 0."""
    return -(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny))).sum()


def _choices(topk_ids: jax.Array, num_experts: int, tokens: Tokens) -> jax.Array:
    """int32 [T, E]: how often each token chose each expert; 0 where there is no token."""
    return tokens.keep((topk_ids[:, :, None] == jnp.arange(num_experts)).sum(1, dtype=jnp.int32))


def _probabilities(routing: Routing, tokens: Tokens) -> jax.Array:
    """float32 [T, E]: scores that sum to 1 over the experts; zeros where there is no token."""
    total = jnp.maximum(routing.scores.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return tokens.keep(routing.scores / total)

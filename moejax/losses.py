"""Losses that keep routers balanced, and the statistics of the load they make.

All are taken over the tokens of every chip: sums are made locally and added over the mesh axes that split the tokens.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoadStats:
    """How evenly the tokens fell on the experts.

    Attributes:
      tokens_per_expert: int32 [E], assignments before anything is dropped.
      dropped_per_expert: int32 [E], assignments for which the expert had no room.
      unrouted: int32 [], tokens without any assignment: padding for the router, or chosen by no expert where experts
        choose.
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


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which tokens of a batch these [T] are, and how to sum over all of them.

    Attributes:
      index: int32 [T], position of each in the flattened batch.
      total: tokens in the whole batch; an index at or past it is padding and counts for nothing.
      sequence_length: tokens of one sequence.
      axes: mesh axes over which the batch is split; empty on a single chip.
    """

    index: jax.Array
    total: int
    sequence_length: int
    axes: Sequence[str] = ()

    @property
    def valid(self) -> jax.Array:
        """Bool [T]: false for padding."""
        return self.index < self.total

    def sum(self, x: jax.Array) -> jax.Array:
        """Adds `x` over the chips."""
        return jax.lax.psum(x, tuple(self.axes)) if self.axes else x


def tokens_per_expert(routing: Routing, num_experts: int, tokens: Tokens) -> jax.Array:
    """int32 [E]: assignments over all chips."""
    return tokens.sum(_chosen(routing, num_experts, tokens).sum(0, dtype=jnp.int32))


def router_losses(routing: Routing, config: MoEConfig, tokens: Tokens) -> dict[str, jax.Array]:
    """The losses whose weight in `config` is not 0, each multiplied by its weight, float32 [].

    Returns:
      A dict with some of the keys "load_balance", "sequence_balance", "z".
    """
    losses = {}
    if config.load_balance_loss:
        losses["load_balance"] = config.load_balance_loss * load_balance_loss(routing, config, tokens)
    if config.sequence_balance_loss:
        losses["sequence_balance"] = config.sequence_balance_loss * sequence_balance_loss(routing, config, tokens)
    if config.z_loss:
        losses["z"] = config.z_loss * z_loss(routing, tokens)
    return losses


def load_balance_loss(routing: Routing, config: MoEConfig, tokens: Tokens) -> jax.Array:
    """E · Σ_e f_e · P_e, f_e the share of assignments and P_e the mean probability of expert e; 1 when balanced.

    Switch Transformer (arXiv 2101.03961), equation 4, with f over all K choices.
    """
    chosen = _chosen(routing, config.num_experts, tokens)
    load = tokens.sum(chosen.sum(0, dtype=jnp.float32)) / (tokens.total * config.top_k)
    probability = tokens.sum(_probabilities(routing, tokens).sum(0)) / tokens.total
    return config.num_experts * (jax.lax.stop_gradient(load) * probability).sum()


def sequence_balance_loss(routing: Routing, config: MoEConfig, tokens: Tokens) -> jax.Array:
    """The load-balance loss of each sequence on its own, averaged over sequences; 1 when all are balanced.

    DeepSeek-V3 (arXiv 2412.19437), equations 17–20, scores normalised over the experts. A sequence may lie on
    several chips.
    """
    num_sequences = -(-tokens.total // tokens.sequence_length)
    # A product with the membership matrix adds in a fixed order; a scatter-add would not on every platform.
    member = tokens.index // tokens.sequence_length == jnp.arange(num_sequences)[:, None]

    def per_sequence(values: jax.Array) -> jax.Array:
        sums = jnp.dot(member.astype(jnp.float32), values.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return tokens.sum(sums) / tokens.sequence_length

    load = per_sequence(_chosen(routing, config.num_experts, tokens)) / config.top_k
    probability = per_sequence(_probabilities(routing, tokens))
    return config.num_experts * (jax.lax.stop_gradient(load) * probability).sum(1).mean()


def z_loss(routing: Routing, tokens: Tokens) -> jax.Array:
    """Mean of (log Σ_e exp logit_e)², which keeps logits small. ST-MoE (arXiv 2202.08906), equation 5."""
    z = jax.nn.logsumexp(routing.logits, axis=1) ** 2
    return tokens.sum(jnp.where(tokens.valid, z, 0).sum()) / tokens.total


def importance_loss(gates: jax.Array, tokens: Tokens) -> jax.Array:
    """The squared coefficient of variation of the experts' total weight; 0 when balanced.

    Shazeer et al. 2017 (arXiv 1701.06538), equations 6 and 7. The same of the smooth load is their load loss,
    equations 10 and 11.

    Args:
      gates: float32 [T, E], what each token gives to each expert: its weight (0 where not chosen), or the probability
        of choosing it under noise.
      tokens: which tokens they are.
    """
    total = tokens.sum(jnp.where(tokens.valid[:, None], gates, 0).sum(0))
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
    p = jnp.where(tokens.valid[:, None], probabilities, 0)
    mean = tokens.sum(p.sum(0)) / tokens.total
    of_mean = _entropy(mean)
    of_each = tokens.sum(_entropy(p)) / tokens.total
    return 1 - (of_mean - of_each) / math.log(max(p.shape[1], 2))


def _entropy(p: jax.Array) -> jax.Array:
    """−Σ p ln p, with a finite gradient where a p is 0."""
    return -(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny))).sum()


def _chosen(routing: Routing, num_experts: int, tokens: Tokens) -> jax.Array:
    """Bool [T, E]: the experts that each token chose; none for padding."""
    chosen = (routing.topk_ids[:, :, None] == jnp.arange(num_experts)).any(1)
    return chosen & tokens.valid[:, None]


def _probabilities(routing: Routing, tokens: Tokens) -> jax.Array:
    """float32 [T, E]: scores that sum to 1 over the experts; zeros for padding."""
    total = jnp.maximum(routing.scores.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.where(tokens.valid[:, None], routing.scores / total, 0)

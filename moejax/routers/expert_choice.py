"""Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes the tokens that suit it best.

    S = softmax(x · W)                          [T, E], over the experts
    expert e takes the C tokens with the largest S[:, e], C = ⌈capacity_factor · T·K / E⌉
    y[t] = Σ S[t, e] · expert e (x[t])          over the experts that took t: none, a few, or all

The load is balanced by construction. **Not causal**: whether an expert takes a token depends on all other tokens of
the call, later ones and those of other sequences among them. A language model trained so sees a little of what it has
to predict, and at inference, token by token, it routes otherwise than in training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.losses import router_losses
from moejax.router import Routing, poison
from moejax.routers.base import Batch, Decision, Gate, Router, plain_choice
from moejax.routers.layer import RoutedMoE, refuse_scaled_inputs, without_capacity
from sharding.exchange_plan import expert_capacity


class ExpertChoice(Router):
    """Experts choose among the T tokens of a call.

    The choices are laid out as [T, E], column e for expert e: so many ids are −1, and rows are made only for the E·C
    that are not.

    Attributes:
      gate: the linear map.
      capacity_factor: what each expert takes, as a multiple of T·K / E.
    """

    causal = False

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, capacity_factor: float = 1.0):
        super().__init__(config)
        self.gate = Gate(config, rngs=rngs, mesh=mesh)
        self.capacity_factor = capacity_factor

    def __call__(self, x: jax.Array, batch: Batch) -> Decision:
        """Each expert's best tokens, as ids [T, E]."""
        config, num_tokens = self.config, batch.num_tokens
        capacity = expert_capacity(num_tokens, config.top_k, config.num_experts, self.capacity_factor)
        capacity = min(capacity, num_tokens)
        logits = self.gate(x)
        scores = jax.nn.softmax(logits)
        experts = jnp.arange(config.num_experts, dtype=jnp.int32)
        _, taken = jax.lax.top_k(jax.lax.stop_gradient(scores).T, capacity)
        is_taken = jnp.zeros(scores.shape, bool).at[taken, experts[:, None]].set(True)
        weights = scores * config.routed_scaling_factor * poison(logits)
        routing = Routing(jnp.where(is_taken, experts, -1), weights, scores, logits)
        # Loads are equal whatever the scores are: a loss that balances them has nothing to do.
        z_only = dataclasses.replace(config, load_balance_loss=0.0, sequence_balance_loss=0.0)
        losses = router_losses(routing, z_only, batch.tokens)
        return Decision(routing, losses, max_choices=config.num_experts * capacity)


def expert_choice(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None) -> RoutedMoE:
    """Experts choose; top_k of `config` is the mean number of experts a token gets, times capacity_factor (default 1).

    Of the losses only z_loss is used. Tokens that no expert took are counted in `aux.load.unrouted`.

    Raises:
      ValueError: `config` scales inputs instead of outputs.
    """
    refuse_scaled_inputs(config, "expert_choice")
    config = plain_choice(config)
    capacity_factor = 1.0 if config.capacity_factor is None else config.capacity_factor
    router = ExpertChoice(config, rngs=rngs, mesh=mesh, capacity_factor=capacity_factor)
    return RoutedMoE(without_capacity(config), router, rngs=rngs, mesh=mesh)

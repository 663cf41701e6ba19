"""Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes the tokens that suit it best.

    S = softmax(x · W)                          [T, E], over the experts
    expert e takes the C tokens with the largest S[:, e], C = ⌈capacity_factor · T·K / E⌉
    y[t] = Σ S[t, e] · expert e (x[t])          over the experts that took t: none, a few, or all

The load is balanced by construction. **Not causal**: whether an expert takes a token depends on all other tokens of
the call, including later ones and those of other sequences. A language model that is trained this way sees a little of
what it has to predict, and at inference, token by token, it routes differently than in training.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moejax.checks import require, require_number
from moejax.losses import router_losses
from moejax.param import Param
from moejax.router import Routing, lowest, poison
from moejax.routers.base import Decision, Given, Params, Router, gate_logits, gate_table
from sharding.exchange.capacity import expert_capacity
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig


@dataclasses.dataclass(frozen=True)
class ExpertChoiceRouter(Router):
    """Experts choose among the tokens of a call; top_k of the layer is the mean number of experts a token gets.

    The choices are laid out as [T, E], column e for expert e: so many ids are −1, and rows are made only for the E·C
    that are not. Tokens that no expert took are counted in `aux.load.unrouted`. No expert has a capacity beside this.

    Attributes:
      capacity_factor: what each expert takes, as a multiple of T·K / E.
      routed_scaling_factor: the weights are multiplied by this.
      router_bias: whether the gate has a bias.
      z_loss: weight of the router z-loss. Loads are equal whatever the scores are, so there is no loss to balance them.
    """

    causal = False
    replays = False

    capacity_factor: float = 1.0
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    z_loss: float = 0.0

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        require_number("capacity_factor", self.capacity_factor, positive=True)
        require_number("routed_scaling_factor", self.routed_scaling_factor)

    def check_layer(self, config: "MoEConfig") -> None:
        """See `Router.check_layer`."""
        self.refuse_scaled_inputs(config)
        expected = "None with ExpertChoiceRouter, which has its own: ExpertChoiceRouter(capacity_factor=…)"
        require(config.capacity_factor is None, "capacity_factor", expected, config.capacity_factor)

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """See `Router.table`."""
        return gate_table(config, bias=self.router_bias)

    def route(self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given) -> Decision:
        """Each expert's best tokens of the whole batch, as ids [T, E]."""
        num_experts = config.num_experts
        capacity = expert_capacity(tokens.total, config.top_k, num_experts, self.capacity_factor)
        capacity = min(capacity, tokens.total)
        logits = gate_logits(x, params["kernel"], params.get("bias"))
        scores = jax.nn.softmax(logits)
        experts = jnp.arange(num_experts, dtype=jnp.int32)
        is_taken = self._taken(jax.lax.stop_gradient(scores), capacity, config, tokens)
        weights = scores * self.routed_scaling_factor * poison(logits)
        routing = Routing(jnp.where(is_taken, experts, -1), weights, scores, logits)
        losses = router_losses(routing, tokens, z=self.z_loss)
        return Decision(routing, losses, max_choices=num_experts * capacity, limited=False)

    def _taken(self, scores: jax.Array, capacity: int, config: "MoEConfig", tokens: Tokens) -> jax.Array:
        """Bool [T, E]: whether each expert takes each token of this chip. All chips' scores are looked at."""
        ranking = tokens.keep(scores, lowest(scores.dtype))
        # In the order of the batch, in which the earlier of equal tokens wins.
        index = tokens.gather(tokens.index).reshape(-1)
        everywhere = tokens.gather(ranking).reshape(-1, config.num_experts)
        everywhere = jnp.full_like(everywhere, lowest(scores.dtype)).at[index].set(everywhere, unique_indices=True)
        _, taken = jax.lax.top_k(everywhere.T, capacity)
        room = capacity
        if tokens.real is not None:
            room = expert_capacity(tokens.count, config.top_k, config.num_experts, self.capacity_factor)
        is_in = jnp.broadcast_to(jnp.arange(capacity) < room, taken.shape)
        experts = jnp.arange(config.num_experts, dtype=jnp.int32)[:, None]
        is_taken = jnp.zeros(everywhere.shape, bool).at[taken, experts].set(is_in)
        return tokens.keep(is_taken[tokens.index], False)

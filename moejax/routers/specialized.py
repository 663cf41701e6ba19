"""Joint gate–expert specialisation, after Learning to Specialize (Farhat et al. 2023–2025, arXiv 2306.08586).

Taken from the paper:
- Gate and experts are trained jointly, on the loss of the task, which reaches the gate through the weights of the
  chosen experts; the paper shows that training either alone leaves experts without a speciality.
- The gate decides from what a *common expert* makes of the token, not from the token alone.
Changed:
- The paper's common expert is a whole pretrained network. Here it is a bottleneck beside the token,
  x + silu(x · A) · B, trained with the rest.
- In the paper experts come to differ because the data of its clients do. Shuffled data lack that push; an explicit
  objective replaces it: the mutual information of token and expert (`specialization_loss`), as
  Mod-Squad (arXiv 2212.08066) uses it: each token sure of its experts, all experts used.
Not implemented: federated rounds, clients and their averaging, and one choice of experts for a client's whole data.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moejax.checks import require_integer, require_number
from moejax.losses import router_losses, specialization_loss
from moejax.param import Param
from moejax.routers.base import Decision, Given, Params, Router, gate_logits, gate_table
from moejax.routers.top_k import TopKRouter
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig


@dataclasses.dataclass(frozen=True)
class SpecializedRouter(Router):
    """Top-k of a softmax gate informed by a small common expert, with a loss that rewards specialisation.

    Attributes:
      common_width: R, width of the common expert; None for H / 4.
      normalize_topk: scale the K weights of a token to sum 1.
      routed_scaling_factor: the weights are multiplied by this.
      router_bias: whether the gate has a bias.
      specialization_loss: weight of the loss.
      sequence_balance_loss: weight of DeepSeek-V3's loss per sequence.
      z_loss: weight of the router z-loss.
    """

    common_width: int | None = None
    normalize_topk: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    specialization_loss: float = 0.01
    sequence_balance_loss: float = 0.0
    z_loss: float = 0.0

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        if self.common_width is not None:
            require_integer("common_width", self.common_width, at_least=1)
        require_number("routed_scaling_factor", self.routed_scaling_factor)

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """The gate, and A [H, R] and B [R, H] of the common expert."""
        hidden = config.hidden_size
        width = max(hidden // 4, 1) if self.common_width is None else self.common_width
        return gate_table(config, bias=self.router_bias) | {
            "common_in": Param((hidden, width), ("embed", None), "router kernel"),
            "common_out": Param((width, hidden), (None, "embed"), "router kernel"),
        }

    def route(self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given) -> Decision:
        """The K best scores of what the common expert made of x."""
        common_in, common_out = (params[name].astype(config.dtype) for name in ("common_in", "common_out"))
        common = jnp.dot(jax.nn.silu(jnp.dot(x, common_in)), common_out)
        logits = gate_logits(x + common, params["kernel"], params.get("bias"))
        plain = TopKRouter(normalize_topk=self.normalize_topk, routed_scaling_factor=self.routed_scaling_factor)
        routing = plain.choose(logits, config, topk_ids=given.topk_ids)
        losses = router_losses(routing, tokens, sequence_balance=self.sequence_balance_loss, z=self.z_loss)
        if self.specialization_loss:
            own = self.specialization_loss * specialization_loss(routing.scores, tokens)
            losses = {"specialization": own} | losses
        return Decision(routing, losses)

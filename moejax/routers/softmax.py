"""Top-k softmax: the plain router, with the load-balance loss of the Switch Transformer."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.losses import router_losses
from moejax.router import route_logits
from moejax.routers.base import Batch, Decision, Gate, Router, or_default, plain_choice
from moejax.routers.layer import RoutedMoE


class ScoreRouter(Router):
    """Top-k of the scores of a linear gate, by the rules of the configuration (`moejax.router`), and its losses.

    Attributes:
      gate: the linear map.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        super().__init__(config)
        self.gate = Gate(config, rngs=rngs, mesh=mesh)

    def correction_bias(self) -> jax.Array | None:
        """float32 [E], added to the scores for the choice only; None here."""
        return None

    def __call__(self, x: jax.Array, batch: Batch) -> Decision:
        """The K best scores, and the losses that the configuration weighs."""
        config = dataclasses.replace(self.config, backend=batch.backend)
        routing = route_logits(self.gate(x), config, correction_bias=self.correction_bias())
        return Decision(routing, router_losses(routing, config, batch.tokens))


def softmax(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None) -> RoutedMoE:
    """Top-k of softmax scores, with the losses of `config`; load_balance_loss is 0.01 if it has none."""
    config = or_default(plain_choice(config), load_balance_loss=0.01)
    return RoutedMoE(config, ScoreRouter(config, rngs=rngs, mesh=mesh), rngs=rngs, mesh=mesh)

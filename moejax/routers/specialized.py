"""Joint gate–expert specialisation, after Learning to Specialize (Farhat et al. 2023–2025, arXiv 2306.08586).

Taken from the paper:
- Gate and experts are trained jointly, on the loss of the task, which reaches the gate through the weights of the
  chosen experts; the paper shows that training either alone leaves experts without a speciality.
- The gate decides from what a *common expert* makes of the token, not from the token alone.
Changed:
- The paper's common expert is a whole pretrained network. Here it is a bottleneck beside the token,
  x + silu(x · A) · B, trained with the rest.
- In the paper experts come to differ since the data of its clients do. Data that come shuffled lack that push; in its
  place stands an explicit objective, the mutual information of token and expert (`specialization_loss`), as
  Mod-Squad (arXiv 2212.08066) uses it: each token sure of its experts, all experts used.
Not implemented: federated rounds, clients and their averaging, and one choice of experts for a client's whole data.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.layer import new_param
from moejax.losses import router_losses, specialization_loss
from moejax.router import route_logits
from moejax.routers.base import Batch, Decision, Gate, Router, or_default, plain_choice
from moejax.routers.layer import RoutedMoE

_KERNEL = nnx.initializers.lecun_normal()


class Specialized(Router):
    """A softmax gate informed by a small common expert, with a loss that rewards specialisation.

    Attributes:
      common_in: nnx.Param [H, R], A.
      common_out: nnx.Param [R, H], B.
      gate: the linear map, of what the common expert made of the token.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, common_width: int | None = None):
        width = max(config.hidden_size // 4, 1) if common_width is None else common_width
        if width < 1:
            raise ValueError(f"common_width must be at least 1, got {common_width}")
        super().__init__(config)
        self.gate = Gate(config, rngs=rngs, mesh=mesh)
        hidden, dtype = config.hidden_size, config.param_dtype
        self.common_in = new_param(_KERNEL, (hidden, width), dtype, rngs=rngs, mesh=mesh)
        self.common_out = new_param(_KERNEL, (width, hidden), dtype, rngs=rngs, mesh=mesh)

    def __call__(self, x: jax.Array, batch: Batch) -> Decision:
        """The K best scores of what the common expert made of x."""
        config = dataclasses.replace(self.config, backend=batch.backend)
        common = jnp.dot(jax.nn.silu(jnp.dot(x, self._cast(self.common_in))), self._cast(self.common_out))
        routing = route_logits(self.gate(x + common), config)
        losses = {"specialization": config.load_balance_loss * specialization_loss(routing.scores, batch.tokens)}
        others = dataclasses.replace(config, load_balance_loss=0.0)
        return Decision(routing, losses | router_losses(routing, others, batch.tokens))

    def _cast(self, param: nnx.Param) -> jax.Array:
        return param[...].astype(self.config.dtype)


def specialized(
    config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, common_width: int | None = None
) -> RoutedMoE:
    """Top-k softmax on top of a common expert of `common_width` (default H/4).

    load_balance_loss of `config` weighs the specialisation loss, 0.01 if it has none.
    """
    config = or_default(plain_choice(config), load_balance_loss=0.01)
    router = Specialized(config, rngs=rngs, mesh=mesh, common_width=common_width)
    return RoutedMoE(config, router, rngs=rngs, mesh=mesh)

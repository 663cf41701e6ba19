"""Balancing without a loss: a bias on each expert's score, moved against its load after every step.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), after Wang et al. 2024 (arXiv 2408.15664):

    choice = top-k of sigmoid(x · W) + b        b of an expert with more than the mean load falls, of others rises
    weight = sigmoid at the choice, which b has no part in
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.layer import RouterState
from moejax.routers.base import or_default
from moejax.routers.layer import RoutedMoE
from moejax.routers.softmax import ScoreRouter


class LossFree(ScoreRouter):
    """Sigmoid scores with a correction bias.

    Attributes:
      bias: RouterState float32 [E], zero at first.
      update_rate: how far it moves in a step.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, update_rate: float = 1e-3):
        if update_rate <= 0:
            raise ValueError(f"update_rate must be positive, got {update_rate}")
        super().__init__(config, rngs=rngs, mesh=mesh)
        self.bias = RouterState(jnp.zeros(config.num_experts, jnp.float32))
        self.update_rate = update_rate

    def correction_bias(self) -> jax.Array:
        """float32 [E]."""
        return self.bias[...]

    def update(self, load: jax.Array) -> None:
        """B += rate · sign(mean load − load)."""
        load = load.astype(jnp.float32)
        self.bias[...] += self.update_rate * jnp.sign(load.mean() - load)


def loss_free(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, update_rate: float = 1e-3) -> RoutedMoE:
    """Sigmoid scores balanced by a bias, which `layer.update(aux)` moves by `update_rate` (0.001 is the paper's).

    load_balance_loss of `config` is not looked at. sequence_balance_loss is 1e-4, the paper's, if it has none.
    """
    config = deepseek_choice(config, num_groups=1, topk_groups=1)
    router = LossFree(config, rngs=rngs, mesh=mesh, update_rate=update_rate)
    return RoutedMoE(config, router, rngs=rngs, mesh=mesh)


def deepseek_choice(config: MoEConfig, *, num_groups: int, topk_groups: int) -> MoEConfig:
    """`config` with sigmoid scores, a correction bias, these groups, and no loss but that of sequences."""
    config = dataclasses.replace(
        config,
        scoring="sigmoid",
        correction_bias=True,
        load_balance_loss=0.0,
        num_groups=num_groups,
        topk_groups=topk_groups,
    )
    return or_default(config, sequence_balance_loss=1e-4)

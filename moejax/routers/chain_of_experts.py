"""Chain-of-Experts (Wang et al. 2025, arXiv 2506.18945): several passes through the same experts, one after another.

    x⁰ = x,   xᵖ = xᵖ⁻¹ + Σ_k weight · expert(xᵖ⁻¹),   y = xᶜ        each pass with a router of its own

A pass gives a token K / C experts, so that a chain costs what one pass with K experts does.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.functional import MoEAux
from moejax.losses import LoadStats
from moejax.routers.base import Router, or_default, plain_choice
from moejax.routers.layer import RoutedMoE, load_stats
from moejax.routers.softmax import ScoreRouter
from sharding.mesh import EXPERT_AXIS, AnyMesh


class ChainOfExperts(RoutedMoE):
    """`RoutedMoE` whose experts a token passes once for each of its routers, with a residual around each pass.

    The input is part of the output (y begins as x). A shared expert works in every pass. Losses are the mean of the
    passes, loads and drops their sum.

    Attributes:
      router: of the first pass.
      later_routers: of the other passes.
    """

    def __init__(
        self,
        config: MoEConfig,
        routers: list[Router],
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        expert_axis: str = EXPERT_AXIS,
    ):
        """Makes the parameters of the experts; see `RoutedMoE`. None of the routers may be noisy."""
        if not routers or any(router.noisy for router in routers):
            raise ValueError("routers must be one or more routers without noise, one for each pass")
        super().__init__(config, routers[0], rngs=rngs, mesh=mesh, expert_axis=expert_axis)
        self.later_routers = nnx.List(routers[1:])

    def routers(self) -> list[Router]:
        """One for each pass; all are updated from the load of all passes together."""
        return [self.router, *self.later_routers]

    def forward(
        self, x: jax.Array, token_ids: jax.Array | None, key: jax.Array | None, mesh: AnyMesh | None
    ) -> tuple[jax.Array, MoEAux]:
        """See `RoutedMoE.forward`."""
        state = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        batch = self.batch(x, token_ids, key, mesh)
        passes: list[MoEAux] = []
        is_routed = jnp.zeros(batch.num_tokens, bool)
        for router in self.routers():
            tokens = state.astype(self.config.dtype)
            decision = router(tokens, batch)
            y, dropped = self.apply_experts(tokens, decision, mesh)
            state += y.astype(jnp.float32)
            is_routed |= (decision.routing.topk_ids >= 0).any(1)
            passes.append(MoEAux(decision.losses, load_stats(decision, dropped, self.config.num_experts, batch)))
        losses = jax.tree.map(lambda *each: sum(each) / len(each), *(one.losses for one in passes))
        load = LoadStats(
            jnp.sum(jnp.stack([one.load.tokens_per_expert for one in passes]), axis=0),
            jnp.sum(jnp.stack([one.load.dropped_per_expert for one in passes]), axis=0),
            (~is_routed).sum(dtype=jnp.int32),
        )
        return state.reshape(x.shape).astype(x.dtype), MoEAux(losses, load)


def chain_of_experts(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, passes: int = 2) -> ChainOfExperts:
    """Softmax routers, ⌈K / passes⌉ experts a token and pass; load_balance_loss is 0.01 if `config` has none."""
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    config = plain_choice(config, top_k=math.ceil(config.top_k / passes))
    config = or_default(config, load_balance_loss=0.01)
    routers: list[Router] = [ScoreRouter(config, rngs=rngs, mesh=mesh) for _ in range(passes)]
    return ChainOfExperts(config, routers, rngs=rngs, mesh=mesh)

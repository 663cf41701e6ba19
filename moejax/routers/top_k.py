"""Top-k of the scores of a linear gate: the router of most published models.

Softmax with renormalising is Mixtral's, Qwen3's and gpt-oss's router; softmax without, and K = 1, the Switch
Transformer's (arXiv 2101.03961); sigmoid with correction bias and groups DeepSeek-V3's (arXiv 2412.19437, section
2.1.2); groups ranked by their best score DeepSeek-V2's (arXiv 2405.04434). Among equal scores the expert with the lower
number wins, so routing is deterministic.

A correction bias balances without a loss: it is added to the scores for choosing experts but not for weighting them,
and moved against the load after every step (Wang et al. 2024, arXiv 2408.15664).
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from moejax.checks import check_config, require, require_integer, require_number
from moejax.losses import router_losses
from moejax.param import Param
from moejax.router import Routing, check_logits, forced, lowest, poison, without
from moejax.routers.base import Decision, Given, Params, Router, gate_logits, gate_table
from pallas_kernels.top_k import (
    Groups,
    limited_to_groups,
    ranked_top_k,
    softmax_top_k,
    softmax_weights_at,
    top_k,
    top_k_ids,
    weights_at,
)
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus"]

_SCORES = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    # The gradient of a root is infinite at 0, which softplus reaches.
    "sqrt_softplus": lambda logits: jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), jnp.finfo(jnp.float32).tiny)),
}


@dataclasses.dataclass(frozen=True)
class TopKRouter(Router):
    """The K best scores of each token.

    Attributes:
      scoring: "softmax" over all experts, "sigmoid" of each, or "sqrt_softplus", the square root of each softplus.
      normalize_topk: scale the K weights of a token to sum 1.
      routed_scaling_factor: the weights are multiplied by this after all else.
      num_groups: groups that the experts are divided into for group-limited routing (1: no limit).
      topk_groups: groups a token may pick experts from.
      group_score_k: a group is ranked by the sum of so many of its best scores; 1 ranks by the best.
      router_bias: whether the gate has a bias.
      correction_bias: whether a bias, which no gradient trains, is added to the scores for choosing experts.
      update_rate: how far `update` moves it, against the sign of the load's excess.
      load_balance_loss: weight of the Switch load-balance loss.
      sequence_balance_loss: weight of DeepSeek-V3's loss per sequence.
      z_loss: weight of the router z-loss.
    """

    scoring: Scoring = "softmax"
    normalize_topk: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score_k: int = 2
    router_bias: bool = False
    correction_bias: bool = False
    update_rate: float = 1e-3
    load_balance_loss: float = 0.0
    sequence_balance_loss: float = 0.0
    z_loss: float = 0.0

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        require(self.scoring in _SCORES, "scoring", " or ".join(map(repr, _SCORES)), self.scoring)
        require_number("routed_scaling_factor", self.routed_scaling_factor)
        require_number("update_rate", self.update_rate, positive=True)
        for name in ("num_groups", "topk_groups", "group_score_k"):
            require_integer(name, getattr(self, name), at_least=1)
        groups, kept = self.num_groups, self.topk_groups
        require(num_experts % groups == 0, "num_groups", f"a divisor of num_experts={num_experts}", groups)
        require(kept <= groups, "topk_groups", f"at most num_groups={groups}", kept)
        reachable = kept * (num_experts // groups)
        require(top_k <= reachable, "top_k", f"at most the {reachable} experts of topk_groups={kept} groups", top_k)

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """See `Router.table`."""
        table = gate_table(config, bias=self.router_bias)
        if self.correction_bias:
            table["correction_bias"] = Param((config.num_experts,), (None,), "state")
        return table

    def route(self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given) -> Decision:
        """See `Router.route`."""
        logits = gate_logits(x, params["kernel"], params.get("bias"))
        routing = self.choose(logits, config, correction_bias=params.get("correction_bias"), topk_ids=given.topk_ids)
        return Decision(routing, self.losses(routing, tokens))

    def choose(
        self,
        logits: jax.Array,
        config: "MoEConfig",
        *,
        correction_bias: jax.Array | None = None,
        topk_ids: jax.Array | None = None,
    ) -> Routing:
        """The choice from float32 logits [T, E]; `topk_ids` [T, K] are forced where they are not −1."""
        check_logits(logits)
        k, backend = config.top_k, config.backend
        scores, is_softmax = _SCORES[self.scoring](logits), self.scoring == "softmax"
        of_call: dict[str, Any] = {"normalize": self.normalize_topk, "backend": backend}
        if correction_bias is None and self.num_groups == 1 and topk_ids is None:
            choose, ranking = (softmax_top_k, logits) if is_softmax else (top_k, scores)
            weights, ids = choose(ranking, k, **of_call)
        elif topk_ids is None and not is_softmax:
            ranking = self._ranking(logits, scores, correction_bias)
            weights, ids = ranked_top_k(scores, ranking, k, groups=self._groups, **of_call)
        else:
            ranking = self._ranking(logits, scores, correction_bias)
            if self._groups is not None:
                ranking = limited_to_groups(ranking, self._groups)
            if topk_ids is None:
                ids = top_k_ids(ranking, k, backend=backend)
            else:
                ids = forced(top_k_ids(without(ranking, topk_ids), k, backend=backend), topk_ids)
            weigh, weighed = (softmax_weights_at, logits) if is_softmax else (weights_at, scores)
            weights = weigh(weighed, ids, normalize=self.normalize_topk)
        if not is_softmax:
            weights *= poison(logits)  # softmax spreads a NaN itself
        return Routing(ids, weights * self.routed_scaling_factor, scores, logits)

    def losses(self, routing: Routing, tokens: Tokens) -> dict[str, jax.Array]:
        """Those that the settings weigh."""
        return router_losses(
            routing,
            tokens,
            load_balance=self.load_balance_loss,
            sequence_balance=self.sequence_balance_loss,
            z=self.z_loss,
        )

    def update(self, params: Params, load: jax.Array) -> dict[str, Any]:
        """Moves the correction bias: b += rate · sign(mean load − load)."""
        if not self.correction_bias:
            return {}
        load = load.astype(jnp.float32)
        direction = jnp.sign(load.mean(-1, keepdims=True) - load)
        return {"correction_bias": params["correction_bias"] + self.update_rate * direction}

    def _ranking(self, logits: jax.Array, scores: jax.Array, correction_bias: jax.Array | None) -> jax.Array:
        """What the choice goes by, but for groups, where it is not the scores alone, or in part given; no gradient."""
        if self.scoring == "softmax" and correction_bias is None and self.num_groups == 1:
            # As `softmax_top_k` ranks: many a softmax is 0. What is `without` choice ranks below even −inf.
            return jax.lax.stop_gradient(jnp.maximum(logits, lowest(logits.dtype) / 2))
        ranking = jax.lax.stop_gradient(scores)
        if correction_bias is not None:
            ranking += jax.lax.stop_gradient(correction_bias.astype(jnp.float32))
        return ranking

    @property
    def _groups(self) -> Groups | None:
        """The limit of the choice, if there is one."""
        return None if self.num_groups == 1 else Groups(self.num_groups, self.topk_groups, self.group_score_k)


def route(
    x: jax.Array,
    kernel: jax.Array,
    config: "MoEConfig",
    *,
    bias: jax.Array | None = None,
    correction_bias: jax.Array | None = None,
    topk_ids: jax.Array | None = None,
) -> Routing:
    """Routes each token to `config.top_k` distinct experts by the rules of config.router, a `TopKRouter`.

    Args:
      x: [T, H].
      kernel: [H, E].
      config: scoring, groups, normalisation.
      bias: [E], added to the logits.
      correction_bias: [E], added to the scores for the choice only; takes no gradient.
      topk_ids: int32 [T, K], choices that are forced, −1 where the router chooses freely; None for none.

    Raises:
      ValueError: config.router is another router, shapes do not fit, or logits that are known (outside jit) are NaN.
        Under jit a token with a NaN logit gets valid experts and NaN weights, so that its output is NaN.
    """
    check_config(config)
    if not isinstance(config.router, TopKRouter):
        raise ValueError(f"config.router must be a TopKRouter, got {type(config.router).__name__}; call the layer")
    if x.ndim != 2 or kernel.shape != (x.shape[1], config.num_experts):
        raise ValueError(
            f"x must be [T, H] and kernel [H, E] = {[config.hidden_size, config.num_experts]}, got x {list(x.shape)} "
            f"and kernel {list(kernel.shape)}"
        )
    logits = gate_logits(x, kernel, bias)
    return config.router.choose(logits, config, correction_bias=correction_bias, topk_ids=topk_ids)

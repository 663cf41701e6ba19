"""Routing: which K experts a token goes to, and with what weight.

    logits = x · kernel (+ bias)            float32, whatever x is
    scores = softmax(logits) | sigmoid(logits)
    choice = top-k of scores (+ correction bias), within the best groups if groups limit the choice
    weight = scores at the choice, renormalised if asked, times the scaling factor

Softmax with renormalising is Mixtral's, Qwen3's and gpt-oss's router; softmax without, and K = 1, the Switch
Transformer's (arXiv 2101.03961); sigmoid with correction bias and groups DeepSeek-V3's (arXiv 2412.19437, section
2.1.2). Among equal scores the expert with the lower number wins, so routing is deterministic.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.router_logits import router_logits
from pallas_kernels.concrete import nan_rows
from pallas_kernels.top_k import top_k, top_k_ids, weights_at

_MASKED = -jnp.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router says of T tokens.

    Attributes:
      topk_ids: int32 [T, K], the chosen experts, best first.
      topk_weights: float32 [T, K].
      scores: float32 [T, E], softmax or sigmoid of the logits.
      logits: float32 [T, E].
    """

    topk_ids: jax.Array
    topk_weights: jax.Array
    scores: jax.Array
    logits: jax.Array


def route(
    x: jax.Array,
    kernel: jax.Array,
    config: MoEConfig,
    *,
    bias: jax.Array | None = None,
    correction_bias: jax.Array | None = None,
) -> Routing:
    """Routes each token to `config.top_k` distinct experts.

    Args:
      x: [T, H].
      kernel: [H, E].
      config: scoring, groups, normalisation.
      bias: [E], added to the logits.
      correction_bias: [E], added to the scores for the choice only; takes no gradient.

    Raises:
      ValueError: shapes do not fit, or logits that are known (outside jit) are NaN. Under jit a token with a NaN
        logit gets valid experts and NaN weights, so that its output is NaN.
    """
    if x.ndim != 2 or kernel.shape != (x.shape[1], config.num_experts):
        raise ValueError(
            f"x must be [T, H] and kernel [H, E] = {[config.hidden_size, config.num_experts]}, got x {list(x.shape)} "
            f"and kernel {list(kernel.shape)}"
        )
    logits = router_logits(x, kernel)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    return route_logits(logits, config, correction_bias=correction_bias)


def route_logits(logits: jax.Array, config: MoEConfig, *, correction_bias: jax.Array | None = None) -> Routing:
    """`route` from float32 logits [T, E] on."""
    check_logits(logits)
    scores = jax.nn.softmax(logits) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
    if correction_bias is None and config.num_groups == 1:
        weights, topk_ids = top_k(scores, config.top_k, normalize=config.normalize_topk, backend=config.backend)
    else:
        topk_ids = top_k_ids(_ranking(scores, config, correction_bias), config.top_k, backend=config.backend)
        weights = weights_at(scores, topk_ids, normalize=config.normalize_topk)
    if config.scoring == "sigmoid":
        weights *= poison(logits)  # softmax spreads a NaN itself
    return Routing(topk_ids, weights * config.routed_scaling_factor, scores, logits)


def check_logits(logits: jax.Array) -> None:
    """Raises ValueError if logits [T, E] that are known (outside jit) are NaN."""
    if bad := nan_rows(logits):
        raise ValueError(
            f"logits of {len(bad)} of {logits.shape[0]} tokens are NaN (first: token {bad[0]}); look for "
            "NaN or infinity in the layer's input or in the router's kernel"
        )


def poison(logits: jax.Array) -> jax.Array:
    """float32 [T, 1], a factor for the weights: NaN where any logit of the token is, even one not chosen; else 1."""
    return jnp.where(jnp.isnan(logits).any(1, keepdims=True), jnp.nan, 1.0)


def _ranking(scores: jax.Array, config: MoEConfig, correction_bias: jax.Array | None) -> jax.Array:
    """What the choice goes by, where it is not the scores alone; takes no gradient."""
    ranking = jax.lax.stop_gradient(scores)
    if correction_bias is not None:
        ranking += jax.lax.stop_gradient(correction_bias.astype(jnp.float32))
    return _limit_to_groups(ranking, config) if config.num_groups > 1 else ranking


def _limit_to_groups(ranking: jax.Array, config: MoEConfig) -> jax.Array:
    """Masks the experts outside each token's best groups; a group is as good as the sum of its two best scores."""
    num_tokens = ranking.shape[0]
    grouped = ranking.reshape(num_tokens, config.num_groups, -1)
    best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, groups = jax.lax.top_k(best_two.sum(-1), config.topk_groups)
    allowed = (groups[:, :, None] == jnp.arange(config.num_groups)).any(1)
    return jnp.where(allowed[:, :, None], grouped, _MASKED).reshape(num_tokens, -1)

"""Routing: which K experts a token goes to, and with what weight.

    logits = x · kernel (+ bias)            float32, whatever x is
    scores = softmax(logits) | sigmoid(logits) | sqrt(softplus(logits))
    choice = top-k of scores (+ correction bias), within the best groups if groups limit the choice
    weight = scores at the choice, renormalised if asked, times the scaling factor

`moejax.routers.TopKRouter` has the settings.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.tracing.concrete import nan_rows
from pallas_kernels.tracing.running_sums import running_sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router says of T tokens.

    Attributes:
      topk_ids: int32 [T, K], the chosen experts, best first.
      topk_weights: float32 [T, K].
      scores: float32 [T, E], of the logits.
      logits: float32 [T, E].
    """

    topk_ids: jax.Array
    topk_weights: jax.Array
    scores: jax.Array
    logits: jax.Array


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


def forced(free_ids: jax.Array, topk_ids: jax.Array) -> jax.Array:
    """The choices `topk_ids` [T, K], and where they are −1 the first of `free_ids` [T, K], best first."""
    is_free = topk_ids < 0
    place = running_sums(is_free, axis=1) - is_free.astype(jnp.int32)
    return jnp.where(is_free, jnp.take_along_axis(free_ids, place, axis=1), topk_ids)


def without(ranking: jax.Array, topk_ids: jax.Array) -> jax.Array:
    """`ranking` [T, E] with the lowest value for the experts that `topk_ids` [T, K] names: none is chosen twice."""
    taken = (topk_ids[:, :, None] == jnp.arange(ranking.shape[1])).any(1)
    return jnp.where(taken, lowest(ranking.dtype), ranking)


def lowest(dtype: jax.typing.DTypeLike) -> jax.Array:
    """What ranks below everything; finite, as `jax.debug_infs` wants it."""
    return jnp.asarray(jnp.finfo(dtype).min, dtype)

"""Top-k: which K of E scores are the largest, for each token, and what they weigh.

scores [T, E] -> ids [T, K], best first, and weights [T, K]; among equal scores the lower number wins.
logits [T, E] -> the same, of their softmax.
scores, ranking [T, E] -> the same, with ids by the ranking, perhaps within the best groups of experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.primitive import Operands, Operator, zero_tangent
from pallas_kernels.top_k.groups import Groups, limited_to_groups
from pallas_kernels.top_k.places import taken
from pallas_kernels.top_k.reference import softmax_weights_at, weights_at
from pallas_kernels.tracing.concrete import is_less


class TopK(NamedTuple):
    """The choice of T tokens.

    Attributes:
      weights: float32 [T, K].
      ids: int32 [T, K].
    """

    weights: jax.Array
    ids: jax.Array


def top_k(scores: jax.Array, k: int, *, normalize: bool = False, backend: str = "auto") -> TopK:
    """The `k` largest scores of each row, and where they are.

    Args:
      scores: float32 [T, E]; not negative where they are to be normalised.
      k: 1 … E.
      normalize: whether the weights of a row are divided by their sum.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      TopK. The gradient passes through the weights. A row of NaN gets valid places, which ones is not said, and NaN.

    Raises:
      ValueError: `scores` is not a floating-point matrix, or `k` is out of range.
    """
    _check(scores, k)
    return TopK(*_top_k(backend, scores=scores, k=k, normalize=normalize))


def ranked_top_k(
    scores: jax.Array,
    ranking: jax.Array,
    k: int,
    *,
    groups: Groups | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> TopK:
    """Where the `k` largest numbers of each row of `ranking` are, and the scores at these places.

    Args:
      scores: float32 [T, E]; not negative where they are to be normalised.
      ranking: float32 [T, E], what the choice goes by. Takes no gradient.
      k: 1 … E, of groups no more than those that are kept have.
      groups: a token chooses from its best groups alone; None for no limit.
      normalize: whether the weights of a row are divided by their sum.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      TopK. The gradient passes through the weights. A row of NaN gets valid places, which ones is not said.

    Raises:
      ValueError: `scores` and `ranking` are not floating-point matrices of one shape, `k` is out of range, or the
        groups are not equal parts of E.
    """
    _check(scores, k)
    _check(ranking, k, name="ranking")
    if scores.shape != ranking.shape:
        raise ValueError(f"ranking must have the shape of scores, {list(scores.shape)}, got {list(ranking.shape)}")
    if groups is not None:
        groups.check(scores.shape[1], k)
    ranking = jax.lax.stop_gradient(ranking)
    return TopK(*_ranked_top_k(backend, scores=scores, ranking=ranking, k=k, groups=groups, normalize=normalize))


def softmax_top_k(logits: jax.Array, k: int, *, normalize: bool = False, backend: str = "auto") -> TopK:
    """The `k` largest logits of each row, where they are, and their softmax.

    Args:
      logits: float32 [T, E].
      k: 1 … E.
      normalize: whether the softmax is over the chosen logits, so that the weights of a row sum to 1, or over all.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      TopK. The gradient passes through the weights; where they are normalised, it keeps nothing of [T, E]. A row that
      holds NaN gets valid places, which ones is not said, and NaN.

    Raises:
      ValueError: `logits` is not a floating-point matrix, or `k` is out of range.
    """
    _check(logits, k, name="logits")
    return TopK(*_softmax_top_k(backend, logits=logits, k=k, normalize=normalize))


def top_k_ids(scores: jax.Array, k: int, *, backend: str = "auto") -> jax.Array:
    """The places of the `k` largest scores of each row. Takes no gradient.

    Args:
      scores: float32 [T, E].
      k: 1 … E.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      int32 [T, K]. A row that holds NaN gets valid places, which ones is not said.

    Raises:
      ValueError: `scores` is not a floating-point matrix, or `k` is out of range.
    """
    _check(scores, k)
    return _top_k_ids(backend, scores=jax.lax.stop_gradient(scores), k=k)


def _top_k_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    return _jvp_of_scores(_top_k(backend, **operands), operands, tangents)


def _ranked_top_k_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    return _jvp_of_scores(_ranked_top_k(backend, **operands), operands, tangents)


def _jvp_of_scores(choice: Any, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    """A choice (weights, ids) whose weights are scores, and its tangent."""
    weights, ids = choice

    def chosen(scores: jax.Array) -> jax.Array:
        return weights_at(scores, ids, normalize=operands["normalize"])

    _, dweights = jax.jvp(chosen, (operands["scores"],), (tangents["scores"],))
    return (weights, ids), (dweights, zero_tangent(ids))


def _softmax_top_k_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    weights, ids = _softmax_top_k(backend, **operands)
    if operands["normalize"]:  # a softmax of K numbers, of which the weights say all, NaN too
        dlogits = taken(backend, x=tangents["logits"], ids=ids, columns=operands["logits"].shape[1])
        dlogits = dlogits.astype(jnp.float32)
        dweights = weights * (dlogits - (weights * dlogits).sum(1, keepdims=True))
        return (weights, ids), (dweights, zero_tangent(ids))

    def chosen(logits: jax.Array) -> jax.Array:
        return softmax_weights_at(logits, ids, normalize=False)

    _, dweights = jax.jvp(chosen, (operands["logits"],), (tangents["logits"],))
    return (weights, ids), (dweights, zero_tangent(ids))


_top_k = Operator("top_k", "top_k", jvp=_top_k_jvp)
_ranked_top_k = Operator("top_k", "ranked_top_k", jvp=_ranked_top_k_jvp)
_softmax_top_k = Operator("top_k", "softmax_top_k", jvp=_softmax_top_k_jvp)
_top_k_ids = Operator("top_k", "top_k_ids")


def _check(scores: jax.Array, k: int, *, name: str = "scores") -> None:
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point matrix [T, E], got {scores.dtype}{list(scores.shape)}")
    if k < 1 or is_less(scores.shape[1], k):
        raise ValueError(f"k must be 1 to E = {scores.shape[1]}, got {k}")


__all__ = [
    "Groups",
    "TopK",
    "limited_to_groups",
    "ranked_top_k",
    "softmax_top_k",
    "softmax_weights_at",
    "top_k",
    "top_k_ids",
    "weights_at",
]

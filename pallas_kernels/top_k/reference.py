"""Top-k in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.top_k.groups import Groups, limited_to_groups
from pallas_kernels.top_k.places import taken


def top_k(scores: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.top_k`."""
    ids = top_k_ids(scores, k)
    return weights_at(scores, ids, normalize=normalize), ids


def softmax_top_k(logits: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.softmax_top_k`."""
    ids = top_k_ids(logits, k)
    return softmax_weights_at(logits, ids, normalize=normalize), ids


def ranked_top_k(
    scores: jax.Array, ranking: jax.Array, k: int, *, groups: Groups | None, normalize: bool
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.ranked_top_k`."""
    ids = top_k_ids(ranking if groups is None else limited_to_groups(ranking, groups), k)
    return weights_at(scores, ids, normalize=normalize), ids


def top_k_ids(scores: jax.Array, k: int) -> jax.Array:
    """See `pallas_kernels.top_k.top_k_ids`."""
    return jax.lax.top_k(scores, k)[1].astype(jnp.int32)


def weights_at(scores: jax.Array, ids: jax.Array, *, normalize: bool) -> jax.Array:
    """The scores [T, E] at ids [T, K], divided by their sum if they are to be normalised: float32 [T, K]."""
    weights = _at(scores, ids).astype(jnp.float32)
    if normalize:
        # The smallest normal number keeps 0/0 out when all chosen scores underflow.
        weights = weights / jnp.maximum(weights.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return weights


def softmax_weights_at(logits: jax.Array, ids: jax.Array, *, normalize: bool) -> jax.Array:
    """The softmax of logits [T, E] at ids [T, K]; over those alone if they are to be normalised: float32 [T, K].

    NaN where any logit of the token is, even one not chosen.
    """
    logits = logits.astype(jnp.float32)
    if not normalize:
        return _at(jax.nn.softmax(logits), ids)
    weights = jax.nn.softmax(_at(logits, ids))
    return weights * jnp.where(jnp.isnan(logits).any(1, keepdims=True), jnp.nan, 1.0)


def _at(x: jax.Array, ids: jax.Array) -> jax.Array:
    return taken("auto", x=x, ids=ids.astype(jnp.int32), columns=x.shape[1])

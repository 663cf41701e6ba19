"""Top-k on NVIDIA GPUs: K rounds of finding the maximum (`rounds`), with the scores in registers.

Rows of a power of two scores have a block for a few of them (`rows`, and `few` where there are fewer than that); the
others one for 64 (`tiles`).

XLA sorts every row instead. The scores are read once:

    floor in time = (4·T·E + 8·T·K) bytes / HBM bandwidth; of few tokens, how long a kernel takes to start
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.top_k import reference
from pallas_kernels.top_k.gpu import few, rows, tiles
from pallas_kernels.top_k.gpu.rounds import Rounds
from pallas_kernels.top_k.groups import Groups, limited_to_groups

_MOST_EXPERTS = 256  # two registers a thread for each, of 255


def top_k(scores: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.top_k`."""
    _require(scores)
    if _is_left_to_xla(scores):
        return reference.top_k(scores, k, normalize=normalize)
    ids, weights = _choose(scores, Rounds(k, normalize))
    return weights, ids


def softmax_top_k(logits: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.softmax_top_k`."""
    _require(logits)
    if _is_left_to_xla(logits):
        return reference.softmax_top_k(logits, k, normalize=normalize)
    ids, weights = _choose(logits, Rounds(k, normalize, softmax=True))
    return weights, ids


def ranked_top_k(
    scores: jax.Array, ranking: jax.Array, k: int, *, groups: Groups | None, normalize: bool
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.ranked_top_k`; what does not fit into one kernel is left to XLA in part."""
    _require(ranking)
    way = few if few.fits(ranking) else rows
    fits = scores.dtype == jnp.float32 and way.fits(ranking)
    if groups is not None and not (fits and way.fits_groups(ranking, groups)):
        ranking, groups = limited_to_groups(ranking, groups), None
    if fits:
        ids, weights = way.choose(scores, Rounds(k, normalize), with_weights=True, ranking=ranking, groups=groups)
        return weights, ids
    ids = top_k_ids(ranking, k)
    return reference.weights_at(scores, ids, normalize=normalize), ids


def top_k_ids(scores: jax.Array, k: int) -> jax.Array:
    """See `pallas_kernels.top_k.top_k_ids`."""
    _require(scores)
    if _is_left_to_xla(scores):
        return reference.top_k_ids(scores, k)
    (ids,) = _choose(scores, Rounds(k, normalize=False), with_weights=False)
    return ids


def _require(scores: jax.Array) -> None:
    require_hopper("top_k")
    experts = scores.shape[1]
    if scores.dtype != jnp.float32 or experts % 8 or experts > _MOST_EXPERTS:
        raise Unsupported(
            f"top_k: the kernel takes float32 scores of up to {_MOST_EXPERTS} experts, a multiple of 8, got "
            f"{scores.dtype} and {experts}"
        )


def _is_left_to_xla(scores: jax.Array) -> bool:
    """Whether there is nothing to choose, or the copy engine cannot bring the scores of so few tokens."""
    tokens = scores.shape[0]
    of_odd_size = tokens < tiles.TOKENS and scores.nbytes % few.COPIED_BYTES != 0
    return tokens == 0 or (of_odd_size and not rows.fits(scores))


def _choose(scores: jax.Array, rounds: Rounds, *, with_weights: bool = True) -> list[jax.Array]:
    """Ids [T, K], and their weights [T, K] if wanted."""
    way = next((way for way in (rows, few) if way.fits(scores)), tiles)
    return way.choose(scores, rounds, with_weights=with_weights)


__all__ = ["ranked_top_k", "softmax_top_k", "top_k", "top_k_ids"]

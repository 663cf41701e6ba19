"""Tokens that fall on the experts in a known way: balanced, by Zipf's law, or as real text does.

A load is activations and a router's matrix whose product makes the choice, so that a real router can be timed on it.

    balanced  every expert gets the same number of assignments, to one
    zipf      the r-th most wanted expert is wanted r^−s times as often as the first, experts in random order; a
              token's choices are drawn without replacement (Gumbel top-k, arXiv 1903.06059)
    text      bytes of a text, embedded with those before them, and a random router: the skew is that of the text
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from bench.inputs.quick_jit import quick_jit
from bench.inputs.text import default_text_path, embed, read_text, sample_contexts

Kind = Literal["balanced", "zipf", "text"]
KINDS: Sequence[Kind] = ("balanced", "zipf", "text")

_read_text = functools.lru_cache(maxsize=1)(read_text)
_CHOSEN, _STEP, _NOISE = 4.0, 0.25, 0.1  # far enough apart for 16-bit activations to keep the order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """Tokens x [T, H], of about unit root mean square, and a router [H, E], both in the dtype asked for."""

    x: jax.Array
    router: jax.Array


@dataclasses.dataclass(frozen=True)
class LoadFigures:
    """How unevenly assignments fell on experts.

    Attributes:
      cv: coefficient of variation of the experts' assignments; 0 when balanced.
      kl: Kullback–Leibler divergence from the uniform distribution, in nats; 0 when balanced, ln E at most.
      entropy: entropy over its maximum ln E; 1 when balanced, 0 when one expert takes all.
      overflow_rate: share of the assignments that lie beyond the capacity of their expert.
    """

    cv: float
    kl: float
    entropy: float
    overflow_rate: float


def make_load(
    kind: Kind,
    *,
    num_tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    seed: int = 0,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    zipf_exponent: float = 1.0,
    text: pathlib.Path | None = None,
) -> Load:
    """Tokens of a load, equal for equal arguments; `text` is a file, or None for a text that Python carries.

    Raises:
      ValueError: the kind is unknown, H is less than E, so that no router can tell the experts apart, K is more than E,
        the exponent is negative, or the file cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"load must be one of {', '.join(KINDS)}, got {kind!r}")
    if hidden < num_experts:
        raise ValueError(
            f"hidden must be at least experts={num_experts}, so that a router can tell them apart; got {hidden}"
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"k must be 1 to experts={num_experts}, got {top_k}")
    if not 0 <= zipf_exponent < math.inf:
        raise ValueError(f"the exponent of Zipf's law must be at least 0, got {zipf_exponent}")
    rng = np.random.default_rng(seed)
    orthonormal, _ = np.linalg.qr(rng.standard_normal((hidden, num_experts)))
    router = jnp.asarray(orthonormal, jnp.float32)
    if kind == "text":
        contexts = sample_contexts(_read_text(text or default_text_path(), "--text"), num_tokens, seed)
        return _embedded(jnp.asarray(contexts), router, hidden=hidden, seed=seed, dtype=jnp.dtype(dtype))
    if kind == "zipf":
        rank = rng.permutation(num_experts) + 1.0
        logits = rng.gumbel(size=(num_tokens, num_experts)) - zipf_exponent * np.log(rank)
    else:
        logits = _balanced_logits(rng, num_tokens, num_experts, top_k)
    return _with_logits(jnp.asarray(logits, jnp.float32), router, seed=seed, dtype=jnp.dtype(dtype))


def load_figures(tokens_per_expert: np.ndarray, capacity: int) -> LoadFigures:
    """The figures of assignments [E], when each expert has room for `capacity` of them."""
    load = np.asarray(tokens_per_expert, np.float64)
    total = load.sum()
    if total == 0:
        return LoadFigures(0.0, 0.0, 1.0, 0.0)
    most = math.log(max(load.size, 2))
    entropy = float(special.entr(load / total).sum())
    kl = max(0.0, math.log(load.size) - entropy)
    overflow = float(np.maximum(load - capacity, 0).sum() / total)
    return LoadFigures(float(load.std() / load.mean()), kl, entropy / most, overflow)


def _balanced_logits(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """Choices dealt out in turn, to tokens in random order."""
    logits = _NOISE * rng.standard_normal((num_tokens, num_experts)).clip(-3, 3)
    turn = rng.permutation(num_tokens)[:, None] * top_k + np.arange(top_k)
    chosen = rng.permutation(num_experts)[turn % num_experts]
    logits[np.arange(num_tokens)[:, None], chosen] = _CHOSEN - _STEP * np.minimum(np.arange(top_k), 8)
    return logits


@functools.partial(quick_jit, static_argnames=("hidden", "seed", "dtype"))
def _embedded(contexts: jax.Array, router: jax.Array, *, hidden: int, seed: int, dtype: jnp.dtype) -> Load:
    return Load(embed(contexts, hidden, seed).astype(dtype), router.astype(dtype))


@functools.partial(quick_jit, static_argnames=("seed", "dtype"))
def _with_logits(logits: jax.Array, router: jax.Array, *, seed: int, dtype: jnp.dtype) -> Load:
    """Noise whose product with the router, of orthonormal columns, is changed to `logits`."""
    noise = jax.random.normal(jax.random.key(seed), (logits.shape[0], router.shape[0]), jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    x = noise + jnp.dot(logits - jnp.dot(noise, router, precision=highest), router.T, precision=highest)
    return Load(x.astype(dtype), router.astype(dtype))

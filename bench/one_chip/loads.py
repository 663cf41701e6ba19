"""Tokens that fall on the experts in a known way: balanced, by Zipf's law, or as real text does.

A load is activations and a router's matrix whose product makes the choice, so that a real router can be timed on it.

    balanced  every expert gets the same number of assignments, to one
    zipf      the r-th most wanted expert is wanted r^−s times as often as the first, experts in random order; a
              token's choices are drawn without replacement (Gumbel top-k, arXiv 1903.06059)
    text      bytes of a text, embedded with those before them, and a random router: the skew is that of the text
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from bench.inputs.text import default_text_path, embed, read_text, sample_contexts
from bench.measure.clock import is_nvidia
from bench.one_chip.cases import Case
from pallas_kernels.float32_matmul import float32_matmul

_read_text = functools.lru_cache(maxsize=1)(read_text)
_CHOSEN, _STEP, _NOISE = 4.0, 0.25, 0.1  # far enough apart for 16-bit activations to keep the order


class Load(NamedTuple):
    """Tokens x [T, H], of about unit root mean square, and a router [H, E], both in the dtype of their case."""

    x: jax.Array
    router: jax.Array


def make_load(case: Case) -> Load:
    """Tokens and router of a case, equal for equal cases.

    Raises:
      ValueError: its text cannot be read.
    """
    rng = np.random.default_rng(case.seed)
    orthonormal, _ = np.linalg.qr(rng.standard_normal((case.hidden, case.experts)))
    router = jnp.asarray(orthonormal, jnp.float32)
    if case.load == "text":
        path = default_text_path() if case.text is None else pathlib.Path(case.text)
        contexts = sample_contexts(_read_text(path, "--text"), case.tokens, case.seed)
        return _quickly_compiled(_embedded, jnp.asarray(contexts), router, seed=case.seed, dtype=case.jax_dtype)
    if case.load == "zipf":
        rank = rng.permutation(case.experts) + 1.0
        logits = rng.gumbel(size=(case.tokens, case.experts)) - case.zipf_exponent * np.log(rank)
    else:
        logits = _balanced_logits(rng, case.tokens, case.experts, case.k)
    wanted = jnp.asarray(logits, jnp.float32)
    return _quickly_compiled(_with_logits, wanted, router, seed=case.seed, dtype=case.jax_dtype)


def logits_of(load: Load) -> jax.Array:
    """The router's logits for a load, float32 [T, E]."""
    return jax.block_until_ready(_quickly_compiled(float32_matmul, load.x, load.router))


def load_figures(tokens_per_expert: np.ndarray, capacity: int) -> dict[str, float]:
    """The fields of a record on how unevenly assignments [E] fell, when each expert has room for `capacity` of them."""
    load = np.asarray(tokens_per_expert, np.float64)
    entropy = float(special.entr(load / load.sum()).sum())
    return {
        "load_cv": float(load.std() / load.mean()),
        "load_kl": max(0.0, math.log(load.size) - entropy),
        "load_entropy": entropy / math.log(max(load.size, 2)),
        "overflow_rate": float(np.maximum(load - capacity, 0).sum() / load.sum()),
    }


def _balanced_logits(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """Choices dealt out in turn, to tokens in random order."""
    logits = _NOISE * rng.standard_normal((num_tokens, num_experts)).clip(-3, 3)
    turn = rng.permutation(num_tokens)[:, None] * top_k + np.arange(top_k)
    chosen = rng.permutation(num_experts)[turn % num_experts]
    logits[np.arange(num_tokens)[:, None], chosen] = _CHOSEN - _STEP * np.minimum(np.arange(top_k), 8)
    return logits


def _quickly_compiled[Result](function: Callable[..., Result], *args: jax.Array, **static: Any) -> Result:
    """function(*args, **static), compiled quickly rather than to run quickly.

    On an NVIDIA GPU XLA searches for the fastest kernel of every product, for which it compiles dozens: 10 to 20 s for
    the activations of a load, which take the GPU a millisecond to make.
    """
    without_search = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    options = without_search if is_nvidia(jax.devices()[0]) else None
    return jax.jit(function, static_argnames=tuple(static), compiler_options=options)(*args, **static)


def _embedded(contexts: jax.Array, router: jax.Array, *, seed: int, dtype: jnp.dtype) -> Load:
    return Load(embed(contexts, router.shape[0], seed).astype(dtype), router.astype(dtype))


def _with_logits(logits: jax.Array, router: jax.Array, *, seed: int, dtype: jnp.dtype) -> Load:
    """Noise whose product with the router, of orthonormal columns, is changed to `logits`."""
    noise = jax.random.normal(jax.random.key(seed), (logits.shape[0], router.shape[0]), jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    x = noise + jnp.dot(logits - jnp.dot(noise, router, precision=highest), router.T, precision=highest)
    return Load(x.astype(dtype), router.astype(dtype))

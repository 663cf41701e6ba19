"""How many experts and rows the busiest chip of an expert-parallel group gets, under uniform routing.

Every token picks `top_k` of `num_experts` at random, no group limits; chip c of ep holds the contiguous experts
[c·E/ep, (c+1)·E/ep). Expectations of a maximum over chips have no handy closed form, so they come from a seeded
simulation: the same call gives the same number on every machine.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

Rounding = Literal["round", "ceil"]
ROUNDINGS: Mapping[Rounding, Callable[[float], int]] = {"round": round, "ceil": math.ceil}

SEED = 20250101
MAX_TRIALS = 4096
MAX_PICKS = 1 << 23  # token–expert assignments simulated in one call, which bounds its time and memory
MIN_TRIALS = 64
# DS_TPU tabulates the activated experts up to this batch and reads larger batches from its last row.
LARGEST_TABULATED_BATCH = 256


def activated_experts(
    batch_size: int, ep: int, num_experts: int = 256, top_k: int = 8, rounding: Rounding = "round"
) -> int:
    """Experts that the busiest chip runs in a decode step, as a whole number.

    Args:
      batch_size: sequences in the whole group of chips; counted up to 256, as DS_TPU does.
      ep: chips that share the experts; divides `num_experts`.
      num_experts: E.
      top_k: experts that a token picks.
      rounding: "round" to the nearest as DS_TPU does, or "ceil" as Tier6 does.

    Raises:
      ValueError: a size is not positive, ep does not divide E, top_k exceeds E, or the rounding is unknown.
    """
    check_rounding(rounding)
    expected = expected_activated_experts(min(batch_size, LARGEST_TABULATED_BATCH), ep, num_experts, top_k)
    return max(1, ROUNDINGS[rounding](expected))


@functools.lru_cache(maxsize=1024)
def expected_activated_experts(num_tokens: int, ep: int, num_experts: int = 256, top_k: int = 8) -> float:
    """Expected number of distinct experts that `num_tokens` tokens activate on the chip where they are most.

    Arguments and errors as in `activated_experts`.
    """
    _check(num_tokens, ep, num_experts, top_k)
    local_experts = num_experts // ep
    # Union bound on "some expert is missed": below it the simulation could only confirm that every expert is hit.
    if num_experts * (1 - top_k / num_experts) ** num_tokens < 1e-6:
        return float(local_experts)
    picks = _sample_experts(num_tokens, num_experts, top_k)
    trials = picks.shape[1]
    hit = np.zeros((trials, num_experts), dtype=bool)
    hit[np.arange(trials)[:, None], picks] = True
    return float(hit.reshape(trials, ep, local_experts).sum(axis=2).max(axis=1).mean())


@functools.lru_cache(maxsize=1024)
def expected_busiest_rows(num_tokens: int, ep: int, num_experts: int = 256, top_k: int = 8) -> float:
    """Expected rows (token–expert assignments) on the chip that gets the most of them.

    The mean over chips is num_tokens · top_k / ep. Where the simulation would have too few trials (beyond 16384 tokens
    at top-8) the rows are taken as jointly normal, with the variance of `num_tokens` hypergeometric draws and a fixed
    sum. Arguments and errors as in `activated_experts`.
    """
    _check(num_tokens, ep, num_experts, top_k)
    mean = num_tokens * top_k / ep
    if num_tokens * top_k * MIN_TRIALS > MAX_PICKS:
        normal = np.random.default_rng(SEED).standard_normal((MAX_TRIALS, ep))
        # Exchangeable chips with a fixed sum: independent normals less their mean have exactly that covariance.
        largest = float((normal.max(axis=1) - normal.mean(axis=1)).mean())
        return mean + largest * math.sqrt(mean * (num_experts - top_k) / max(1, num_experts - 1))
    picks = _sample_experts(num_tokens, num_experts, top_k)
    trials = picks.shape[1]
    counts = np.zeros(trials * ep, dtype=np.int64)
    first_bin = np.arange(trials)[:, None] * ep
    for choice in picks:
        counts += np.bincount((first_bin + choice // (num_experts // ep)).ravel(), minlength=trials * ep)
    return float(counts.reshape(trials, ep).max(axis=1).mean())


def check_rounding(rounding: str) -> None:
    """Raises ValueError where `rounding` is none of `ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be 'round' (DS_TPU) or 'ceil' (Tier6), got {rounding!r}")


def _sample_experts(num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """Uniform `top_k`-subsets of the experts, [top_k, trials, num_tokens], by Floyd's algorithm.

    The i-th pick is uniform over the first E − top_k + i + 1 experts; a repeat is replaced by the last of them, which
    no earlier pick can be. That needs top_k draws a token, whatever E is.
    """
    trials = max(1, min(MAX_TRIALS, MAX_PICKS // (num_tokens * top_k)))
    rng = np.random.default_rng(SEED)
    picks = np.empty((top_k, trials, num_tokens), dtype=np.int32)
    for i, last in enumerate(range(num_experts - top_k, num_experts)):
        draw = rng.integers(0, last + 1, size=(trials, num_tokens), dtype=np.int32)
        repeated = (picks[:i] == draw).any(axis=0)
        picks[i] = np.where(repeated, last, draw)
    return picks


def _check(num_tokens: int, ep: int, num_experts: int, top_k: int) -> None:
    for name, value in (("num_tokens", num_tokens), ("ep", ep), ("num_experts", num_experts), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_experts % ep:
        raise ValueError(f"num_experts must be a multiple of ep, got {num_experts} experts for ep={ep}")
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")

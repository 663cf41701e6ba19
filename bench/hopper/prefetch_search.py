"""Which ways to start early are timed for a chain of products, and which ones are worth it.

A choice is a `Prefetch` for each product of the chain. Few combinations are timed all. Of many, the search goes through
the products and keeps for each what is best beside what the others have so far. What is best for a kernel hangs on its
neighbours, so it then times all combinations of a plain launch and the best other value of each product, and choices
that are the same for all products. Everything is timed beside plain launches, in the same rounds.

The fastest of these are timed once more with more rounds (`compare`), so that luck among many does not make a winner.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from bench.measure.samples import Interval
from pallas_kernels.on_gpu.prefetch import PLAIN, Prefetch

Choice = tuple[Prefetch, ...]
"""One value for each product of a chain."""

Sampler = Callable[[Sequence[Choice], int], Mapping[Choice, Sequence[float]]]
"""µs of each choice in each of so many rounds, in which all are timed in turn; those that fail are left out."""

TOP = 10
"""Choices that a search gives."""

SEARCH_ROUNDS = 4
"""Rounds of a choice in a search."""

MOST_COMBINATIONS = 256
"""As many are timed all."""

_OVERLAPS = (1.0, 0.5, 0.0)
_SHARES = (0.5, 1.0)

GRID: tuple[Prefetch, ...] = (
    PLAIN,
    *(Prefetch("pdl", overlap) for overlap in _OVERLAPS),
    *(Prefetch("l2", overlap, share) for overlap in _OVERLAPS for share in _SHARES),
    *(Prefetch("smem", overlap, share) for overlap in _OVERLAPS for share in _SHARES),
)
"""Values that are searched for each product."""

QUICK_GRID: tuple[Prefetch, ...] = (
    PLAIN,
    Prefetch("pdl", 1.0),
    Prefetch("smem", 1.0, 1.0),
    Prefetch("smem", 0.0, 1.0),
)
"""Those that were the fastest in chains of equal products (docs/prefetch.md)."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A choice beside plain launches.

    Attributes:
      choice: what was timed.
      us: µs of the chain.
      speedup: µs of plain launches over its own in the same round.
    """

    choice: Choice
    us: Interval
    speedup: Interval

    @property
    def verdict(self) -> Literal["gain", "no gain", "loss"]:
        """What the confidence interval of the speed-up says: "no gain" where it holds 1."""
        if abs(self.speedup.mean - 1) <= (self.speedup.half or 0):
            return "no gain"
        return "gain" if self.speedup.mean > 1 else "loss"


def search(
    num_products: int, values: Sequence[Prefetch], sample: Sampler, go_on: Callable[[str], bool] = lambda part: True
) -> list[Choice]:
    """The fastest choices, the best one first, `TOP` at most; plain launches are none of them.

    Args:
      num_products: products of the chain.
      values: what each product can have.
      sample: times.
      go_on: asked before each part of the search, which it is told in a few words; False ends it.

    Raises:
      ValueError: plain launches cannot be timed.
    """
    plain: Choice = (PLAIN,) * num_products
    speedups: dict[Choice, float] = {plain: 1.0}

    def time_new(choices: Iterable[Choice]) -> None:
        new = [choice for choice in dict.fromkeys(choices) if choice not in speedups]
        if new:
            samples = sample([plain, *new], SEARCH_ROUNDS)
            for choice in new:
                if choice in samples:
                    speedups[choice] = statistics.median(_speedups(samples, plain, choice))

    def fastest_first() -> list[Choice]:
        return sorted(speedups, key=lambda choice: -speedups[choice])

    if len(values) ** num_products <= MOST_COMBINATIONS:
        if go_on("all combinations"):
            time_new(itertools.product(values, repeat=num_products))
    else:
        best = plain
        of_each: list[list[Prefetch]] = []
        for i in range(num_products):
            if not go_on(f"product {i + 1} of {num_products}"):
                break
            beside = {value: (*best[:i], value, *best[i + 1 :]) for value in values}
            time_new(beside.values())
            timed = sorted((value for value in values if beside[value] in speedups), key=lambda v: -speedups[beside[v]])
            best = beside[timed[0]]
            of_each.append([PLAIN, *[value for value in timed if value != PLAIN][:1]])
        if go_on("combinations of the best"):
            time_new(itertools.product(*of_each, *[[PLAIN]] * (num_products - len(of_each))))
        if go_on("one value for all products"):
            time_new((value,) * num_products for value in values)
    return [choice for choice in fastest_first() if choice != plain][:TOP]


def compare(choices: Sequence[Choice], sample: Sampler, rounds: int) -> list[Comparison]:
    """Plain launches, then each choice that could be timed beside them, the fastest first.

    Args:
      choices: at least one, all of one chain.
      sample: times.
      rounds: at least 2.

    Raises:
      ValueError: plain launches cannot be timed.
    """
    plain: Choice = (PLAIN,) * len(choices[0])
    samples = sample([plain, *choices], rounds)
    compared = [
        Comparison(choice, Interval.of(samples[choice]), Interval.of(_speedups(samples, plain, choice)))
        for choice in dict.fromkeys([plain, *choices])
        if choice in samples or choice == plain
    ]
    return [compared[0], *sorted(compared[1:], key=lambda each: -each.speedup.mean)]


def _speedups(samples: Mapping[Choice, Sequence[float]], plain: Choice, choice: Choice) -> list[float]:
    if plain not in samples:
        raise ValueError("plain launches of the chain cannot be timed, which others are measured by")
    return [base / own for base, own in zip(samples[plain], samples[choice], strict=True)]

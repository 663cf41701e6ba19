"""What repeated measurements say: location, spread, and how far the mean can be trusted.

Two variants are compared by pairs: both are measured in each round, one right after the other, so that whatever drifts
from round to round (clocks, temperature, neighbours) falls on both and cancels in the difference.

    summarise([10.0, 12.0, 11.0]).ci95      # (8.5, 13.5): the mean, 11, ± 2.5
    paired([9.0, 10.0], [10.0, 11.2]).mean  # -1.1: the first is faster
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Summary:
    """Repeated measurements of one thing, in their unit.

    Attributes:
      repeats: how many.
      mean: arithmetic mean.
      std: standard deviation of the population that they are drawn from (n − 1).
      p50: median.
      p95: 95th percentile, interpolated between neighbours.
      ci95: the mean's 95 % confidence interval by Student's t.
    """

    repeats: int
    mean: float
    std: float
    p50: float
    p95: float
    ci95: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One variant less another, measured in pairs.

    Attributes:
      pairs: how many.
      mean: mean difference; below 0 when the first is the smaller.
      ci95: its 95 % confidence interval; the two are told apart when it does not hold 0.
      ratio: mean of the first over mean of the second.
    """

    pairs: int
    mean: float
    ci95: tuple[float, float]
    ratio: float


def summarise(samples: Sequence[float]) -> Summary:
    """The summary of at least two measurements.

    Raises:
      ValueError: there are fewer than two, or one is not a finite number.
    """
    values = np.asarray(samples, np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"samples must be two at least, as one has no spread; got {values.size}")
    if not np.isfinite(values).all():
        raise ValueError(f"samples must be finite numbers, got {list(samples)}")
    mean, std = float(values.mean()), float(values.std(ddof=1))
    half = float(special.stdtrit(values.size - 1, (1 + _CONFIDENCE) / 2)) * std / math.sqrt(values.size)
    p50, p95 = (float(p) for p in np.percentile(values, [50, 95]))
    return Summary(values.size, mean, std, p50, p95, (mean - half, mean + half))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and how far it can be trusted.

    Attributes:
      mean: arithmetic mean.
      half: half of its 95 % confidence interval, by Student's t; None for a single value.
    """

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """The mean of at least one value."""
        if len(values) < 2:
            return cls(values[0], None)
        summary = summarise(values)
        return cls(summary.mean, summary.ci95[1] - summary.mean)


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """What `first` takes more than `second`, measured side by side: first[i] and second[i] in round i.

    Raises:
      ValueError: they are not equally many, or fewer than two.
    """
    if len(first) != len(second):
        raise ValueError(f"paired samples must be equally many, got {len(first)} and {len(second)}")
    difference = summarise([a - b for a, b in zip(first, second, strict=True)])
    ratio = float(np.mean(first) / np.mean(second))
    return Difference(difference.repeats, difference.mean, difference.ci95, ratio)

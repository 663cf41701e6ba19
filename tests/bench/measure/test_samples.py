"""Statistics of repeats against numpy, and of pairs against what they are made of."""

import math

import numpy as np
import pytest

from bench.measure.samples import paired, summarise


def test_summary_against_numpy(rng):
    x = rng.gamma(2.0, 50.0, size=37)
    s = summarise(list(x))
    assert s.repeats == 37
    assert s.mean == pytest.approx(np.mean(x))
    assert s.std == pytest.approx(np.std(x, ddof=1))
    assert s.p50 == pytest.approx(np.median(x))
    assert s.p95 == pytest.approx(np.percentile(x, 95))
    assert sum(s.ci95) / 2 == pytest.approx(s.mean)


@pytest.mark.parametrize(("repeats", "quantile"), [(2, 12.7062), (3, 4.30265), (10, 2.26216), (31, 2.04227)])
def test_intervals_are_those_of_the_t_table(repeats, quantile):
    x = np.arange(repeats, dtype=float)
    low, high = summarise(x).ci95
    assert (high - low) / 2 == pytest.approx(quantile * np.std(x, ddof=1) / math.sqrt(repeats), rel=1e-5)


def test_intervals_hold_the_true_mean_as_often_as_they_say(rng):
    intervals = [summarise(rng.normal(7.0, 3.0, size=6)).ci95 for _ in range(10_000)]
    # The share's own standard deviation is 0.002.
    assert np.mean([low <= 7.0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_pairs_see_what_drift_hides(rng):
    drift = np.linspace(100.0, 200.0, 20)
    noise = rng.uniform(-0.1, 0.1, size=20)
    first, second = drift + 1.0 + noise, drift
    difference = paired(first, second)
    assert difference.pairs == 20
    assert difference.mean == pytest.approx(np.mean(first) - np.mean(second))
    assert difference.ratio == pytest.approx(np.mean(first) / np.mean(second))
    # Every pair differs by 0.9 to 1.1, so half an interval is at most t(19) · 0.103 / √20 = 0.05 for any such noise.
    assert 0.85 < difference.ci95[0] < difference.mean < difference.ci95[1] < 1.15
    # Unpaired, the two intervals overlap.
    assert summarise(second).ci95[1] > summarise(first).ci95[0]


@pytest.mark.parametrize("samples", [[], [1.0]])
def test_too_few(samples):
    with pytest.raises(ValueError, match=f"samples must be two at least, as one has no spread; got {len(samples)}"):
        summarise(samples)


def test_numbers_that_are_none():
    with pytest.raises(ValueError, match="samples must be finite numbers"):
        summarise([1.0, math.nan])


def test_pairs_that_are_none():
    with pytest.raises(ValueError, match="equally many, got 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])

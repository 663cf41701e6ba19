import itertools
import time

import pytest

from bench.model.busiest_chip import activated_experts, expected_activated_experts, expected_busiest_rows

EXPECTED = {
    1: (2.561, 2.028, 1.606, 1.297, 1.109),
    4: (6.575, 4.448, 3.184, 2.326, 1.860),
    16: (16.711, 9.868, 6.059, 3.814, 2.000),
    64: (30.301, 15.837, 8.000, 4.000, 2.000),
    256: (32.000, 16.000, 8.000, 4.000, 2.000),
}
CASES = [(batch, ep, EXPECTED[batch][i]) for batch in EXPECTED for i, ep in enumerate((8, 16, 32, 64, 128))]


@pytest.mark.parametrize(("batch", "ep", "expected"), CASES)
def test_expected_activated_experts(batch, ep, expected):
    assert expected_activated_experts(batch, ep) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("batch", EXPECTED)
def test_one_expert_a_chip_is_one_activated_expert(batch):
    assert expected_activated_experts(batch, 256) == 1


def test_both_roundings():
    assert activated_experts(4, 32) == 3
    assert activated_experts(4, 32, rounding="ceil") == 4
    assert activated_experts(64, 32) == activated_experts(1536, 32) == 8


def test_batches_beyond_256_count_as_256():
    assert activated_experts(100_000, 4, num_experts=256, top_k=1) == activated_experts(256, 4, top_k=1)


def exact_maximum(num_tokens, ep, num_experts, top_k, statistic):
    """The expectation over every possible routing of a tiny case."""
    local = num_experts // ep
    subsets = list(itertools.combinations(range(num_experts), top_k))
    outcomes = [
        max(statistic([e for pick in picks for e in pick if e // local == chip]) for chip in range(ep))
        for picks in itertools.product(subsets, repeat=num_tokens)
    ]
    return sum(outcomes) / len(outcomes)


@pytest.mark.parametrize(
    ("num_tokens", "ep", "num_experts", "top_k"), [(1, 2, 6, 3), (3, 2, 4, 2), (2, 4, 8, 2), (4, 3, 6, 1)]
)
def test_simulation_agrees_with_enumeration(num_tokens, ep, num_experts, top_k):
    args = (num_tokens, ep, num_experts, top_k)
    distinct = exact_maximum(*args, lambda experts: len(set(experts)))
    assert expected_activated_experts(*args) == pytest.approx(distinct, abs=0.05)
    assert expected_busiest_rows(*args) == pytest.approx(exact_maximum(*args, len), abs=0.05)


def test_normal_limit_continues_the_simulation():
    simulated, limit = expected_busiest_rows(16384, 32), expected_busiest_rows(16385, 32)
    assert limit - 4096 == pytest.approx(simulated - 4096, rel=0.15)


@pytest.mark.parametrize("num_tokens", [3, 64, 1536, 50_000])
def test_busiest_chip_has_at_least_the_mean(num_tokens):
    assert expected_busiest_rows(num_tokens, 1) == pytest.approx(num_tokens * 8)
    assert expected_busiest_rows(num_tokens, 256, top_k=256) == pytest.approx(num_tokens)
    assert num_tokens * 8 / 32 < expected_busiest_rows(num_tokens, 32) <= num_tokens * 8


def test_seeded():
    first = expected_activated_experts(16, 32), expected_busiest_rows(16, 32)
    expected_activated_experts.cache_clear()
    expected_busiest_rows.cache_clear()
    assert (expected_activated_experts(16, 32), expected_busiest_rows(16, 32)) == first


def test_large_batch_is_quick():
    expected_busiest_rows.cache_clear()
    start = time.process_time()
    expected_busiest_rows(1536, 32)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 32), "num_tokens must be at least 1, got 0"),
        ((4, 0), "ep must be at least 1, got 0"),
        ((4, 48), "num_experts must be a multiple of ep, got 256 experts for ep=48"),
        ((4, 2, 4, 8), "top_k must be at most num_experts=4, got 8"),
    ],
)
def test_errors(args, message):
    for function in (activated_experts, expected_activated_experts, expected_busiest_rows):
        with pytest.raises(ValueError, match=message):
            function(*args)


def test_unknown_rounding():
    with pytest.raises(ValueError, match=r"'round' \(DS_TPU\) or 'ceil' \(Tier6\), got 'floor'"):
        activated_experts(4, 32, rounding="floor")

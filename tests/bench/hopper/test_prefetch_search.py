"""The search over made-up times: what it times, what it finds, and when a gain is one."""

import itertools

import pytest

from bench.hopper.prefetch_search import GRID, QUICK_GRID, SEARCH_ROUNDS, TOP, compare, search
from pallas_kernels.on_gpu.prefetch import PLAIN, Prefetch

PDL, SMEM = Prefetch("pdl", 1.0), Prefetch("smem", 1.0, 1.0)


def sampler_of(us, noise=lambda choice, number: 0.0):
    """Times of a device that gets slower from round to round; None of `us` is a choice that fails."""
    calls = []

    def sample(choices, rounds):
        calls.append(list(choices))
        assert len(set(choices)) == len(choices)
        return {
            choice: [us(choice) * (1 + 0.1 * number) + noise(choice, number) for number in range(rounds)]
            for choice in choices
            if us(choice) is not None
        }

    return sample, calls


def test_each_product_gets_what_is_best_for_it():
    wanted = (GRID[3], PLAIN, GRID[5], GRID[-1], GRID[1], GRID[2])
    sample, calls = sampler_of(lambda choice: 100 - 3 * sum(a == b for a, b in zip(choice, wanted, strict=True)))
    found = search(6, GRID, sample)
    assert found[0] == wanted
    assert len(found) == len(set(found)) == TOP
    assert (PLAIN,) * 6 not in found
    timed = [choice for call in calls for choice in call[1:]]
    assert all(call[0] == (PLAIN,) * 6 for call in calls)
    assert len(set(timed)) == len(timed) <= 6 * 15 + 2**6 + 15


def test_what_is_best_alone_may_be_worse_beside_another():
    """The first and the last product both gain alone, the last one more; together they lose."""

    def us(choice):
        early = [value != PLAIN for value in choice]
        return 100 - 4 * early[0] - 5 * early[-1] + 8 * (early[0] and early[-1]) - (choice[-1] == SMEM)

    sample, _ = sampler_of(us)
    assert search(6, QUICK_GRID, sample)[0] == (*[PLAIN] * 5, SMEM)


def test_few_combinations_are_timed_all():
    sample, calls = sampler_of(lambda choice: 100 - 10 * (choice == (PDL, SMEM)))
    assert search(2, QUICK_GRID, sample)[0] == (PDL, SMEM)
    assert sorted(calls[0], key=str) == sorted(itertools.product(QUICK_GRID, repeat=2), key=str)
    assert len(calls) == 1


def test_what_fails_is_left_out_but_plain_launches_must_run():
    sample, _ = sampler_of(lambda choice: None if SMEM in choice else 100)
    assert all(SMEM not in choice for choice in search(2, QUICK_GRID, sample))
    sample, _ = sampler_of(lambda choice: 100 if SMEM in choice else None)
    with pytest.raises(ValueError, match="plain launches of the chain cannot be timed"):
        search(2, QUICK_GRID, sample)


def test_a_search_that_is_ended_gives_what_it_has():
    parts = []

    def go_on(part):
        parts.append(part)
        return len(parts) == 1

    sample, calls = sampler_of(lambda choice: 100 - (choice[0] == PDL))
    assert search(6, QUICK_GRID, sample, go_on)[0] == (PDL, *[PLAIN] * 5)
    assert parts[:2] == ["product 1 of 6", "product 2 of 6"]
    assert len(calls) == 1
    assert search(6, QUICK_GRID, sample, lambda part: False) == []


def test_a_gain_is_one_where_the_interval_lies_above_one():
    """Noise of half a percent hides a gain of a tenth of one, and shows one of two; drift of all hides nothing."""
    gain = {PLAIN: 0.0, PDL: 2.0, SMEM: 0.1, QUICK_GRID[3]: -2.0}
    sample, calls = sampler_of(
        lambda choice: 100 - gain[choice[0]],
        lambda choice, number: 0.5 * (-1) ** number * (choice[0] != PLAIN),
    )
    compared = compare([(SMEM,), (QUICK_GRID[3],), (PDL,)], sample, 10)
    assert [each.choice[0] for each in compared] == [PLAIN, PDL, SMEM, QUICK_GRID[3]]
    assert [each.verdict for each in compared] == ["no gain", "gain", "no gain", "loss"]
    assert compared[0].speedup.mean == 1
    assert compared[1].speedup.mean == pytest.approx(100 / 98, abs=1e-3)
    assert calls == [[(PLAIN,), (SMEM,), (QUICK_GRID[3],), (PDL,)]]


def test_rounds_are_enough_for_an_interval():
    assert SEARCH_ROUNDS >= 2

"""The search over made-up times: what it times, and what wins."""

import dataclasses

import pytest

from bench.hopper.products import Product
from bench.hopper.tune_products import TOKENS_A_CHIP, case_products, default_products
from bench.hopper.tune_search import by_modelled_time, other_strips, search, shorter_rings
from bench.model.shapes import GemmShape
from pallas_kernels.chips import get_chip
from pallas_kernels.grouped_matmul.gpu.hopper import tiling

CHIP = get_chip("h200")
PREFILL = Product(GemmShape(8, 4096, 7168, 4096), "bf16")
DECODE = Product(GemmShape(8, 48, 7168, 2048), "fp8")


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    """Whatever has been tuned so far, the search begins with the model."""
    monkeypatch.setattr(tiling, "tuned_configs", lambda chip: {})


def timer_of(function):
    calls = []

    def timer(configs):
        calls.append(list(configs))
        return {config: function(config) for config in configs if function(config) is not None}

    return timer, calls


def pick(product):
    return tiling.pick(CHIP, product.problem)


@pytest.mark.parametrize("product", [PREFILL, DECODE])
def test_the_models_choice_wins_where_nothing_is_faster(product):
    timer, calls = timer_of(lambda config: 10.0)
    outcome = search(product, CHIP, timer)
    assert outcome.model == outcome.best == pick(product)
    assert not outcome.is_worth_it
    assert outcome.num_timed == sum(map(len, calls))


def test_strip_and_ring_are_sought_with_the_best_tile():
    def microseconds(config):
        return 100 - 10 * (config.strip == 8) - 5 * (config.num_stages == shorter) + 50 * (config.block_m < 128)

    shorter = pick(PREFILL).num_stages - 1
    timer, calls = timer_of(microseconds)
    outcome = search(PREFILL, CHIP, timer)
    assert (outcome.best.strip, outcome.best.num_stages) == (8, shorter)
    assert (outcome.model_us, outcome.best_us) == (100, 85)
    assert outcome.gain == pytest.approx(0.15)
    assert outcome.is_worth_it
    assert calls[-1] == [outcome.model, outcome.best]


def test_every_combination_is_timed_if_asked():
    timer, calls = timer_of(lambda config: 1.0)
    few = search(PREFILL, CHIP, timer).num_timed
    assert search(PREFILL, CHIP, timer, exhaustive=True).num_timed > 2 * few
    assert calls[-1][0] == pick(PREFILL)
    assert all(tiling.fits(CHIP, PREFILL.problem, config) for call in calls for config in call)


def test_a_gain_that_does_not_come_back_is_luck():
    seen = set()

    def microseconds(config):
        lucky = config.num_stages == pick(PREFILL).num_stages - 1 and config not in seen
        seen.add(config)
        return 90.0 if lucky else 100.0

    def timer(configs):
        return {config: microseconds(config) for config in configs}

    assert not search(PREFILL, CHIP, timer).is_worth_it


def test_what_fails_is_left_out_but_the_models_choice_must_run():
    model = pick(PREFILL)
    timer, _ = timer_of(lambda config: 10.0 if config == model else None)
    assert search(PREFILL, CHIP, timer).best == model
    timer, _ = timer_of(lambda config: None if config == model else 10.0)
    with pytest.raises(ValueError, match="the model's choice Config"):
        search(PREFILL, CHIP, timer)


def test_strips_and_rings():
    config = tiling.Config(64, 256, 3, 1, 8)
    assert other_strips(DECODE, config) == [config]  # one row of tiles
    assert [c.strip for c in other_strips(PREFILL, config)] == [8, 1, 4, 16]
    narrow = dataclasses.replace(config, strip=2, block_n=64)
    assert [c.strip for c in other_strips(PREFILL, narrow)] == [2, 1, 4, 8, 16, 64]
    assert [c.num_stages for c in shorter_rings(config)] == [2]


def test_the_default_products():
    products = default_products()
    assert len(set(products)) == len(products)
    assert products[: len(case_products())] == case_products()
    names = [product.name for product in products]
    assert "8,48,7168,4096 fp8 gate/up to fp8" in names  # bench.gpu's layer-fp8
    assert "256,2,7168,4096 fp8-blocks gate/up" in names  # DeepSeek-V3, ep 1, 64 tokens
    assert "16,1024,2880,5760 fp8 gate/up" in names  # gpt-oss, ep 8, 4096 tokens, which scales no blocks
    assert "8,1024,14336,4096 bf16" in names  # Mixtral, ep 1, 4096 tokens
    for product in products:
        assert product.lhs_rows >= product.shape.G * product.shape.M
        assert by_modelled_time(product, CHIP)
    of_models = products[len(case_products()) :]
    assert max(p.shape.G * p.shape.M for p in of_models) == max(TOKENS_A_CHIP) * 8

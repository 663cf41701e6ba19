"""Loads fall as they say, through a real router, and their figures are those of independent formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bench.one_chip.cases import DTYPES, LOADS, Case
from bench.one_chip.loads import load_figures, make_load
from moejax.losses import LoadStats
from pallas_kernels.float32_matmul import float32_matmul
from tests.helpers import same_bits


def choice(load, k):
    return np.asarray(jax.lax.top_k(float32_matmul(load.x, load.router), k)[1])


def counts(load, k):
    return np.bincount(choice(load, k).ravel(), minlength=load.router.shape[1])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(256, 8, 1), (256, 8, 4), (100, 32, 8), (7, 8, 2), (64, 4, 4)])
@pytest.mark.quick("100-32-8-fp16", "256-8-1-fp32", "256-8-4-fp32", "64-4-4-fp32", "7-8-2-bf16")
def test_balanced_is_balanced_to_one_assignment(tokens, experts, k, dtype):
    load = make_load(Case("topk", load="balanced", tokens=tokens, hidden=64, experts=experts, k=k, dtype=dtype))
    assert load.x.dtype == load.router.dtype == DTYPES[dtype]
    per_expert = counts(load, k)
    assert per_expert.sum() == tokens * k
    assert np.ptp(per_expert) <= 1


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_zipf_follows_its_law(exponent):
    sizes = {"tokens": 20_000, "hidden": 32, "experts": 8, "k": 1}
    load = make_load(Case("topk", load="zipf", **sizes, zipf_exponent=exponent, seed=3))
    law = np.arange(1, 9) ** -exponent
    expected = 20_000 * law / law.sum()
    measured = np.sort(counts(load, 1))[::-1]
    np.testing.assert_allclose(measured, expected, atol=5 * np.sqrt(expected.max()))


def test_text_is_skewed_by_itself_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 1000)
    case = Case("topk", load="text", tokens=512, hidden=64, experts=8, k=2)
    monotonous = counts(make_load(dataclasses.replace(case, text=str(path))), 2)
    assert sorted(monotonous)[-2:] == [512, 512]
    english = load_figures(counts(make_load(case), 2), capacity=512 * 2 // 8)
    assert 0.1 < english["load_cv"] < 1.5
    assert 0 < english["overflow_rate"] < 0.5


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.quick("zipf")
def test_equal_arguments_give_equal_loads_and_seeds_change_them(kind):
    case = Case("topk", load=kind, tokens=50, hidden=32, experts=8, k=2, seed=1)
    load = make_load(case)
    assert same_bits(load, make_load(case))
    assert not same_bits(load.x, make_load(dataclasses.replace(case, seed=2)).x)
    assert 0.5 < float(jnp.sqrt(jnp.square(load.x.astype(jnp.float32)).mean())) < 2


def test_figures_against_scipy_and_the_layers_own(rng):
    load = rng.integers(0, 100, size=16)
    figures = load_figures(load, capacity=40)
    own = LoadStats(jnp.asarray(load, jnp.int32), jnp.zeros(16, jnp.int32))
    assert figures["load_cv"] == pytest.approx(float(own.cv), rel=1e-5)
    assert figures["load_entropy"] == pytest.approx(float(own.entropy), rel=1e-5)
    assert figures["load_kl"] == pytest.approx(stats.entropy(load / load.sum(), np.full(16, 1 / 16)))
    assert figures["overflow_rate"] == pytest.approx(sum(max(n - 40, 0) for n in load) / load.sum())


def test_figures_at_the_ends():
    balanced, collapsed = load_figures(np.full(8, 5), capacity=5), load_figures(np.array([0, 12, 0, 0]), capacity=3)
    assert balanced == pytest.approx({"load_cv": 0, "load_kl": 0, "load_entropy": 1, "overflow_rate": 0})
    expected = {"load_cv": np.sqrt(3), "load_kl": np.log(4), "load_entropy": 0, "overflow_rate": 0.75}
    assert collapsed == pytest.approx(expected)


def test_a_text_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--text .*none\.txt: cannot be read"):
        make_load(Case("topk", load="text", tokens=8, hidden=16, experts=8, k=2, text=str(tmp_path / "none.txt")))

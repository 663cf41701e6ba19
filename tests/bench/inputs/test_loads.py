"""Loads fall as they say, through a real router, and their figures are those of independent formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bench.inputs.loads import KINDS, load_figures, make_load
from moejax.losses import LoadStats
from moejax.router_logits import router_logits
from tests.helpers import same_bits


def choice(load, k):
    return np.asarray(jax.lax.top_k(router_logits(load.x, load.router), k)[1])


def counts(load, k):
    return np.bincount(choice(load, k).ravel(), minlength=load.router.shape[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(256, 8, 1), (256, 8, 4), (100, 32, 8), (7, 8, 2), (64, 4, 4)])
@pytest.mark.quick("100-32-8-float16", "256-8-1-float32", "256-8-4-float32", "64-4-4-float32", "7-8-2-bfloat16")
def test_balanced_is_balanced_to_one_assignment(tokens, experts, k, dtype):
    load = make_load("balanced", num_tokens=tokens, hidden=64, num_experts=experts, top_k=k, dtype=dtype)
    assert load.x.dtype == load.router.dtype == dtype
    per_expert = counts(load, k)
    assert per_expert.sum() == tokens * k
    assert np.ptp(per_expert) <= 1


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_zipf_follows_its_law(exponent):
    load = make_load("zipf", num_tokens=20_000, hidden=32, num_experts=8, top_k=1, zipf_exponent=exponent, seed=3)
    law = np.arange(1, 9) ** -exponent
    expected = 20_000 * law / law.sum()
    measured = np.sort(counts(load, 1))[::-1]
    np.testing.assert_allclose(measured, expected, atol=5 * np.sqrt(expected.max()))


def test_text_is_skewed_by_itself_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 1000)
    sizes = {"num_tokens": 512, "hidden": 64, "num_experts": 8, "top_k": 2}
    monotonous = counts(make_load("text", **sizes, text=path), 2)
    assert sorted(monotonous)[-2:] == [512, 512]
    english = load_figures(counts(make_load("text", **sizes), 2), capacity=512 * 2 // 8)
    assert 0.1 < english.cv < 1.5
    assert 0 < english.overflow_rate < 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick("zipf")
def test_equal_arguments_give_equal_loads_and_seeds_change_them(kind):
    sizes = {"num_tokens": 50, "hidden": 32, "num_experts": 8, "top_k": 2}
    load = make_load(kind, **sizes, seed=1)
    assert same_bits(load, make_load(kind, **sizes, seed=1))
    assert not same_bits(load.x, make_load(kind, **sizes, seed=2).x)
    assert 0.5 < float(jnp.sqrt(jnp.square(load.x.astype(jnp.float32)).mean())) < 2


def test_figures_against_scipy_and_the_layers_own(rng):
    load = rng.integers(0, 100, size=16)
    figures = load_figures(load, capacity=40)
    own = LoadStats(jnp.asarray(load, jnp.int32), jnp.zeros(16, jnp.int32))
    assert figures.cv == pytest.approx(float(own.cv), rel=1e-5)
    assert figures.entropy == pytest.approx(float(own.entropy), rel=1e-5)
    assert figures.kl == pytest.approx(stats.entropy(load / load.sum(), np.full(16, 1 / 16)))
    assert figures.overflow_rate == pytest.approx(sum(max(n - 40, 0) for n in load) / load.sum())


def test_figures_at_the_ends():
    balanced, collapsed = load_figures(np.full(8, 5), capacity=5), load_figures(np.array([0, 12, 0, 0]), capacity=3)
    assert (balanced.cv, balanced.kl, balanced.entropy, balanced.overflow_rate) == pytest.approx((0, 0, 1, 0))
    assert collapsed.kl == pytest.approx(np.log(4))
    assert (collapsed.entropy, collapsed.overflow_rate) == (0, 0.75)
    assert collapsed.cv == pytest.approx(np.sqrt(3))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("uniform", {}, "load must be one of balanced, zipf, text, got 'uniform'"),
        ("balanced", {"hidden": 4}, "hidden must be at least experts=8, so that a router can tell them apart; got 4"),
        ("zipf", {"top_k": 9}, "k must be 1 to experts=8, got 9"),
        ("zipf", {"zipf_exponent": -1.0}, "the exponent of Zipf's law must be at least 0, got -1.0"),
    ],
)
def test_errors(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make_load(kind, **({"num_tokens": 8, "hidden": 16, "num_experts": 8, "top_k": 2} | changes))


def test_a_text_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--text .*none\.txt: cannot be read"):
        make_load("text", num_tokens=8, hidden=16, num_experts=8, top_k=2, text=tmp_path / "none.txt")

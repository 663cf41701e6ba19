"""A movement that gives a wrong result is an error, whichever of its parts is wrong."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.exchange.measure import STEPS, measure
from bench.exchange.tokens import Tokens
from bench.one_chip.cases import Case
from moejax import MoEConfig
from sharding.exchange.dense import Dense
from sharding.exchange.pick import TRANSPORTS, on_one_axis
from sharding.mesh import make_mesh

EP, TOKENS, HIDDEN = 4, 6, 128


class LosesARow(Dense):
    def carry_back(self, rows, plan, way):
        return super().carry_back(rows, plan, way).at[0].set(0)


class GivesNan(Dense):
    def carry_back(self, rows, plan, way):
        return super().carry_back(rows, plan, way) * jnp.nan


class MixesExpertsUp(Dense):
    """There and back it is right, but each chip's experts get the wrong rows."""

    def carry(self, rows, plan, way):
        return jax.tree.map(lambda leaf: leaf[::-1], super().carry(rows, plan, way))

    def carry_back(self, rows, plan, way):
        return super().carry_back(rows[::-1], plan, way)


WRONG = {kind.__name__: kind() for kind in (LosesARow, GivesNan, MixesExpertsUp)}


def tokens(precision):
    config = MoEConfig(HIDDEN, 128, 8, 2, precision=precision)
    case = Case("topk", tokens=EP * TOKENS, experts=8, k=2, hidden=HIDDEN, load="zipf", zipf_exponent=0.5)
    return Tokens.of(case, config, make_mesh(EP, devices=jax.devices("cpu")[:EP]))


def measured(name, tokens):
    steps = []

    def watch(step):
        steps.append(step)
        return contextlib.nullcontext()

    return measure(name, tokens, length=2, repeats=2, watch=watch), steps


@pytest.mark.parametrize("precision", ["w16a16", "w8a8"])
@pytest.mark.parametrize("name", [*on_one_axis(), "lax.all_to_all", "lax.ragged_all_to_all"])
@pytest.mark.quick("dense-w8a8", "lax.all_to_all-w16a16")
def test_times_of_three_steps_that_are_watched(name, precision):
    moved, steps = measured(name, tokens(precision))
    assert tuple(moved.times) == STEPS
    assert min(time.min_us for time in moved.times.values()) > 0
    assert steps == ["plan", "send", "check of send", "give_back", "together", "check of the result"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_an_error(name, monkeypatch):
    monkeypatch.setitem(TRANSPORTS, name, WRONG[name])
    case = tokens("w16a16")
    with pytest.raises(ValueError, match="wrong result: relative error"):
        measured(name, case)


def test_weights_of_a_token_sum_to_one():
    case = tokens("w16a16")
    np.testing.assert_allclose(np.asarray(case.weights).sum(-1), 1, rtol=1e-6)
    assert case.ids.shape == case.weights.shape == (EP, TOKENS, 2)
    np.testing.assert_array_equal(np.asarray(case.ids).reshape(case.topk_ids.shape), case.topk_ids)

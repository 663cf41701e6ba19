"""Contenders: the same result, and turns."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.blocks import in_jax, in_torch, measure, ours
from bench.blocks.cases import select_cases
from tests.helpers import normal


def test_tokens_that_went_to_other_experts_do_not_count(rng):
    x, y = normal(rng, 2, 1, 8), normal(rng, 2, 1, 8)
    ids = jnp.array([[[0, 1]], [[2, 3]]])
    other = (y.at[1].add(1.0), ids.at[1, 0, 1].set(4))
    assert measure._error(other, (y, ids), x) == 0
    assert measure._error((other[0], None), (y, None), x) > 0.1
    assert measure._error((y, ids[:, :, ::-1]), (y, ids), x) == 0
    assert np.isnan(measure._error((y, ids + 7), (y, ids), x))


def test_contenders_are_timed_in_turns_of_alternating_order():
    calls = []

    def sampler(name):
        return lambda: calls.append(name) or float(len(calls))

    times = measure._in_turns({name: sampler(name) for name in "ab"}, 2)
    assert calls == ["a", "b", "b", "a"]
    assert (times["a"].min_us, times["a"].median_us, times["b"].spread_us) == (1.0, 2.5, 1.0)


def test_a_contender_without_the_memory_for_all_blocks_leaves_the_others(monkeypatch):
    (case,) = select_cases(["tiny"], "w16a16", reduce=True).values()

    def runner(case, inputs):
        def too_much():
            raise MemoryError("too many blocks")

        return ours.runner(case, inputs) if len(inputs.states) == 1 else too_much

    monkeypatch.setattr(in_jax, "runner", runner)
    found = measure.measure_case(case, rounds=1, at_most=2, with_torch=False)["contenders"]
    assert found[measure.OURS]["us"] > 0
    assert "too many blocks" in found[measure.JAX]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w16a16", "w8a8"])
def test_a_step_can_be_repeated(precision):
    (case,) = select_cases(["decode-deepseek-v3-8"], precision, reduce=True).values()
    run = ours.runner(case, ours.make_inputs(case, at_most=2))
    (first, ids), (second, _) = run(), run()
    np.testing.assert_array_equal(first, second)
    assert ids.shape == (2, 1, 8)


@pytest.mark.parametrize("name", ["wide-4x64", "decode-qwen3-30b-a3b-8", "decode-deepseek-v3-8"])
@pytest.mark.slow
def test_the_block_in_torch_is_ours(name):
    pytest.importorskip("torch")
    (case,) = select_cases([name], "w16a16", reduce=True).values()
    inputs = ours.make_inputs(case, at_most=1)
    result = measure.from_torch(in_torch.runner(case, inputs, compiled=False)())
    assert measure._error(result, ours.runner(case, inputs)(), inputs.x) < measure._TOLERANCE


@pytest.mark.parametrize("name", ["wide-4x64", "decode-qwen3-30b-a3b-8", "decode-deepseek-v3-8"])
@pytest.mark.quick("decode-deepseek*")
def test_the_block_in_plain_jax_is_ours(name):
    (case,) = select_cases([name], "w16a16", reduce=True).values()
    inputs = ours.make_inputs(case, at_most=2)
    result = in_jax.runner(case, inputs)()
    assert measure._error(result, ours.runner(case, inputs)(), inputs.x) < measure._TOLERANCE


def test_who_cannot_run_experts_in_8_bits_says_so():
    (case,) = select_cases(["decode-qwen3-30b-a3b-8"], "w8a8", reduce=True).values()
    assert measure._why_not(measure.OURS, case, True) is None
    assert "no experts in 8 bits" in str(measure._why_not(measure.JAX, case, True))

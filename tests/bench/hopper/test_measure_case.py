"""Results are checked before they are timed, and a failure is a reason. Cases are narrow, and run in XLA on the CPU."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from bench.hopper import case_data as problems
from bench.hopper import measure_case as measuring
from bench.hopper.cases import CASES
from bench.hopper.measure_case import attempt, measure_case
from bench.hopper.peers import Implementation
from bench.measure.clock import CallTime
from bench.model.shapes import GemmShape
from tests.bench.hopper.gpu_records import measurement, record


@pytest.fixture
def times(monkeypatch):
    """Stands in for the clock: pops one time for each call, 1 µs when there are none left."""
    left = []

    def clock(f, *args, repeats, calls):
        return CallTime(left.pop(0) if left else 1.0, 1.0, 0.0, {"kernel": 1.0})

    monkeypatch.setattr(measuring, "kernel_times", clock)
    monkeypatch.setattr(measuring, "copies_of", lambda inputs: [inputs, inputs])
    for name in ("grouped_matmul", "grouped_gate_up_in_8_bits"):
        function = getattr(problems, name)
        monkeypatch.setattr(problems, name, functools.partial(_in_xla, function))
    return left


def _in_xla(function, *args, **kwargs):
    return function(*args, **{**kwargs, "backend": "xla"})


@pytest.mark.parametrize("name", ["decode-bf16", "down-fp8", "prefill-fp8-blocks", "layer-fp8", "backward-bf16"])
@pytest.mark.quick("layer-fp8", "backward-bf16")
def test_a_case_is_right(name, times):
    case = dataclasses.replace(CASES[name], shape=GemmShape(2, 8, 256, 128))
    ours, peers = measure_case(case, repeats=1, with_peers=False)
    assert ours["relative_error"] < (4e-3 if name != "layer-fp8" else 4e-2)  # which rounds to FP8 in between
    assert (ours["us"], peers) == (1.0, {})


def test_moving_rows_is_right(times):
    case = dataclasses.replace(CASES["permute-fp16"], shape=GemmShape(128, 40, 64, 64))
    ours, peers = measure_case(case, repeats=1, with_peers=True)
    assert max(ours["relative_error"], peers["xla"]["relative_error"]) < 1e-3


@pytest.mark.parametrize("name", ["qwen3-fp8-8", "qwen3-fp8-64", "gpt-oss-fp8-1", "qwen3-bf16-16384"])
@pytest.mark.slow
def test_a_layer_is_timed_by_the_wall_clock(name):
    case = dataclasses.replace(CASES[name], shape=GemmShape(16, 4, 256, 128))
    ours, _ = measure_case(case, repeats=2, with_peers=False)
    assert ours["relative_error"] < 2e-2
    assert ours["us"] > 0


@pytest.mark.parametrize("name", ["qwen3-train-bf16", "qwen3-train-fp8"])
@pytest.mark.quick("qwen3-train-fp8")
def test_a_training_step_is_right(name):
    case = dataclasses.replace(CASES[name], shape=GemmShape(8, 16, 128, 128))
    ours, peers = measure_case(case, repeats=1, with_peers=True)
    least, most = (0, 2e-2) if name == "qwen3-train-bf16" else (2e-2, 8e-2)
    assert least < ours["relative_error"] < most
    (peer,) = [each for each in peers.values() if "us" in each]
    assert peer["relative_error"] < 2e-2


@pytest.mark.parametrize("name", ["qwen3-sums-bf16", "qwen3-sums-fp8"])
@pytest.mark.quick("qwen3-sums-fp8")
def test_sums_over_micro_batches_are_right(name):
    case = dataclasses.replace(CASES[name], shape=GemmShape(8, 16, 128, 128))
    ours, peers = measure_case(case, repeats=1, with_peers=True)
    assert ours["relative_error"] < case.tolerance
    assert peers["gradients and sums"]["relative_error"] < case.tolerance


def test_peers_get_the_same_inputs(times):
    case = dataclasses.replace(CASES["decode-bf16"], shape=GemmShape(2, 8, 128, 128))
    _, peers = measure_case(case, repeats=1, with_peers=True)
    assert peers["jax.lax.ragged_dot"]["relative_error"] < 4e-3
    assert list(peers["jax ragged_dot_mgpu"]) == ["error"]


def _try(functions, **settings):
    implementation = Implementation("x", "jax", functions, **settings)
    return attempt(implementation, [(jnp.ones(4),)], jnp.ones(4), tolerance=2e-2, repeats=1)


def test_a_wrong_result_is_not_timed(times):
    reason = "ValueError: wrong result: relative error 5.0e-01, limit 2e-02"
    assert _try({"": lambda x: 1.5 * x}) == {"error": reason}
    assert _try({"": lambda x: x * jnp.nan}) == {"error": "ValueError: wrong result: relative error nan, limit 2e-02"}


def test_the_fastest_configuration_that_works_counts(times):
    times += [5.0, 3.0, 4.0]

    def fails(x):
        raise NotImplementedError("too many\n tiles")

    outcome = _try({"a": lambda x: x, "wrong": lambda x: -x, "b": lambda x: x, "fails": fails, "c": lambda x: x})
    assert (outcome["configuration"], outcome["us"]) == ("b", 3.0)
    assert _try({"fails": fails}) == {"error": "NotImplementedError: too many tiles"}
    assert _try({"": lambda x: x}, prepare=fails) == {"error": "NotImplementedError: too many tiles"}


def test_record_of_a_case():
    peers = {"decode-fp8": {"torch._scaled_grouped_mm": measurement(60.0), "other": "not installed"}}
    made = record({"decode-fp8": 30.0}, peers)["cases"]["decode-fp8"]
    assert (made["G"], made["M"], made["K"], made["N"], made["dtype"]) == (8, 48, 7168, 2048, "fp8")
    assert (made["us"], made["min_us"], made["spread_us"], made["kernels"]) == (30.0, 29.0, 2.0, ["kernel"])
    assert made["tb_per_s"] == pytest.approx(4.06, abs=0.01)
    assert made["share_of_measured_floor"] == pytest.approx(121.766 / 4.65 / 30, rel=1e-3)
    assert made["share_of_floor"] < made["share_of_measured_floor"]
    assert (made["goal"], made["met"]) == ({"unit": "µs", "bar": 32, "aim": 28.5}, True)
    assert made["peers"]["torch._scaled_grouped_mm"]["ratio"] == 2.0
    assert made["peers"]["other"] == {"error": "not installed"}


def test_record_of_a_failure():
    made = record({"down-fp8": "Unsupported: no"}, {"down-fp8": {"x": measurement(60.0)}})["cases"]["down-fp8"]
    assert (made["error"], made["met"], made["peers"]["x"]["ratio"]) == ("Unsupported: no", None, None)
    assert "us" not in made


def test_goals_are_not_judged_on_another_chip():
    assert record({"decode-fp8": 30.0}, chip="h100")["cases"]["decode-fp8"]["met"] is None

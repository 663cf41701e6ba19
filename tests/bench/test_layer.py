"""bench.layer: every stage of every layout is timed, results agree and are right, comparisons are in pairs."""

import jax
import jax.numpy as jnp
import pytest

from bench import layer as bench
from bench.command.parser import run
from bench.measure.steps import StepTimer
from bench.one_chip.layouts import LAYOUTS
from moejax import MoEConfig, MoEParams, dense_moe
from tests.bench.one_chip.small_cases import lines, small
from tests.helpers import relative_error

STAGES = ("router", "plan", "dispatch", "gate_up", "down", "combine")
SMALL = ["--tokens", "64", "--hidden", "32", "--experts", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def records():
    case = small("layer", load="zipf", capacity_factor=4.0, with_xla=True)
    return bench.run_case(case, StepTimer(), 3)


@pytest.mark.slow
def test_every_stage_of_every_layout(records):
    timed = {(record["operator"], record["layout"]) for record in records if record["backend"] == "auto"}
    assert timed == {("router", None), *((o, name) for o in (*STAGES[1:], "layer") for name in LAYOUTS)}
    whole = [record for record in records if record["operator"] == "layer"]
    for record in whole[:3]:
        assert tuple(record["stages_us"]) == STAGES
        assert 0 < record["routing_share"] < 1
        for name, mean in record["stages_us"].items():
            own = [r for r in records if r["operator"] == name and r["layout"] in (None, record["layout"])]
            assert own[0]["mean_us"] == mean
    assert whole[3]["stages_us"] is None
    assert [record["paired"] and (record["paired"]["layout"], record["paired"]["backend"]) for record in whole] == [
        None,
        *[("compact", "auto")] * 3,
    ]


@pytest.mark.slow
def test_layouts_agree_when_nothing_overflows(records):
    whole = [record for record in records if record["operator"] == "layer"]
    assert whole[0]["agreement_error"] == 0
    assert all(record["agreement_error"] < 1e-5 for record in whole)
    assert all(record["drop_rate"] == 0 for record in whole)
    assert all(record["load_cv"] == whole[0]["load_cv"] > 0 for record in whole)


@pytest.mark.slow
def test_the_layer_is_the_dense_oracles(rng):
    case = small("layer", load="text")
    measured = {}

    class Keeping(StepTimer):
        def measure(self, steps, values, **settings):
            measured.update(super().measure(steps, values, **settings).values)
            return super().measure(steps, values, **settings)

    bench.run_case(case, Keeping(), 2)
    config = MoEConfig(
        hidden_size=32, intermediate_size=16, num_experts=4, top_k=2, dtype=jnp.float32, param_dtype=jnp.float32
    )
    params = MoEParams({"kernel": measured["router"]}, measured["gate_up"], measured["down"])
    expected = dense_moe(measured["x"], params, config)
    assert relative_error(measured["layer/compact/auto"][0], expected) < 1e-5


@pytest.mark.slow
def test_programs_are_shared_between_loads_and_capacities():
    clock = StepTimer()
    bench.run_case(small("layer", load="zipf", capacity_factor=1.0), clock, 2)
    count = len(clock._programs)
    bench.run_case(small("layer", load="text", capacity_factor=1.0, seed=4), clock, 2)
    assert len(clock._programs) == count
    bench.run_case(small("layer", load="text", capacity_factor=2.0), clock, 2)
    # Of the padded layout, all stages and the whole; nothing of the others.
    assert len(clock._programs) == count + 6


def test_the_command(tmp_path):
    out = ["--out", str(tmp_path)]
    assert run(bench.main, [*SMALL, *out, "--layout", "padded", "--batch-length", "8x8", "--no-split"]) == 0
    (line,) = lines(tmp_path / "layer.jsonl")
    assert (line["batch"], line["length"], line["tokens"], line["intermediate"]) == (8, 8, 64, 16)
    assert (line["operator"], line["layout"], line["dtype"]) == ("layer", "padded", "bf16")


@pytest.mark.slow
def test_disagreement_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(bench, "relative_error", lambda *args: 0.5)
    assert run(bench.main, [*SMALL, "--no-split"]) == 1
    assert "agreement_error 5.0e-01, limit 2e-02" in capsys.readouterr().err


def test_experts_keep_the_size_of_what_they_multiply():
    gate_up, down = bench.expert_weights(2, 256, 64, jnp.dtype(jnp.float32))
    assert (gate_up.shape, down.shape) == ((2, 256, 2, 64), (2, 64, 256))
    for weights in (gate_up.reshape(2, 256, 128), down):
        x = jax.random.normal(jax.random.key(5), (100, weights.shape[1]))
        assert float(jnp.std(x @ weights[0])) == pytest.approx(1, rel=0.1)

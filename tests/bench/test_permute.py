"""bench.permute gives tokens back, says when it does not, and times every operator."""

import jax
import jax.numpy as jnp
import pytest

from bench import permute as bench
from bench.command.parser import run
from bench.measure.clock import rotated
from bench.measure.steps import StepTimer
from bench.one_chip.cases import LOADS
from bench.one_chip.layouts import LAYOUTS
from bench.one_chip.variants import variants
from bench.permute import main, run_case, steps_of
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting
from tests.bench.one_chip.small_cases import lines, small

EVERY = tuple(LAYOUTS)
SMALL = ["--tokens", "64", "--hidden", "32", "--experts", "4", "--repeats", "2"]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.slow
def test_tokens_come_back_in_every_layout_without_overflow(load):
    case = small("permute", dtype="fp16", load=load, layouts=EVERY, split=EVERY, with_xla=True, capacity_factor=4.0)
    records = run_case(case, StepTimer(), 2)
    whole = [record for record in records if record["operator"] == "permute"]
    assert [(r["layout"], r["backend"]) for r in whole] == [*((name, "auto") for name in EVERY), ("compact", "xla")]
    assert all(record["identity_error"] <= 1e-3 for record in whole)
    assert all(record["drop_rate"] == 0 for record in whole)
    assert whole[0]["paired"] is None
    assert all((record["paired"]["layout"], record["paired"]["pairs"]) == ("compact", 2) for record in whole[1:])
    split = {(record["operator"], record["layout"]) for record in records if record["backend"] == "auto"}
    assert split == {("top_k", None), *((o, name) for o in bench.OPERATORS[1:] for name in EVERY)}
    assert whole[1]["stages_us"].keys() == {"top_k", "plan", "pack", "combine"}


def _bytes(record):
    """Moved by the strict convention."""
    return record["bw_strict"] * record["mean_us"]


def test_what_is_dropped_is_counted_and_the_other_tokens_come_back():
    case = small("permute", dtype="fp16", load="zipf", layouts=EVERY, split=EVERY, capacity_factor=1.0)
    records = {record["layout"]: record for record in run_case(case, StepTimer(), 2) if record["operator"] == "permute"}
    assert 0 < records["padded"]["drop_rate"] < 0.5
    assert records["padded"]["drop_rate"] == pytest.approx(records["padded"]["overflow_rate"])
    assert records["compact"]["drop_rate"] == records["block_sparse"]["drop_rate"] == 0
    assert all(record["identity_error"] <= 1e-3 for record in records.values())
    assert _bytes(records["padded"]) < _bytes(records["compact"])


def test_the_command_measures_once_and_prints_a_table(tmp_path, capsys):
    command = [*SMALL, "--load", "balanced,zipf", "--out", str(tmp_path)]
    assert run(main, command) == 0
    out = capsys.readouterr().out
    assert "bw_strict" in out
    records = lines(tmp_path / "permute.jsonl")
    assert len(records) == 2 * 6
    assert {record["records_of_case"] for record in records} == {6}
    assert run(main, command) == 0
    assert lines(tmp_path / "permute.jsonl") == records


def test_the_exit_status_says_that_tokens_did_not_come_back(monkeypatch, capsys):
    right = bench.dispatch_and_combine

    def wrong(x, *args):
        y, plan = right(x, *args)
        return y * 1.01, plan

    monkeypatch.setattr(bench, "dispatch_and_combine", wrong)
    assert run(main, SMALL) == 1
    assert "identity_error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--k", "5"], "k must be at most experts=4, got 5"),
        (["--k", "two"], "argument --k: must be a whole number of at least 1, got 'two'"),
        (["--capacity", "0"], "argument --capacity: must be a positive number, got '0'"),
        (["--load", "flat"], "load must be one of balanced, zipf, text, got 'flat'"),
        (["--layout", "dense"], "unknown layout 'dense'; expected one of compact, padded, block_sparse"),
        (["--dtype", "fp8"], "dtype must be one of fp16, bf16, fp32, got 'fp8'"),
        (["--batch-length", "32*128"], "argument --batch-length: must be pairs such as 32x128,64x256, got '32*128'"),
        (["--hidden", "2"], "hidden must be at least experts=4, got 2"),
        (["--repeats", "1"], "argument --repeats: must be a whole number of at least 2, got '1'"),
        (["--minutes", "0"], "argument --minutes: must be a positive number, got '0'"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got '-1'"),
    ],
)
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, [*SMALL, *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.gpu
def test_device_times_on_a_gpu():
    case = small("permute", tokens=8192, hidden=2048, experts=32, dtype="fp16", with_xla=True)
    records = {(record["operator"], record["backend"]): record for record in run_case(case, StepTimer(), 3)}
    assert all(record["clock"] == "kernels" for record in records.values())
    assert all(record["identity_error"] <= 1e-3 for (name, _), record in records.items() if name == "permute")
    whole = records["permute", "auto"]["mean_us"]
    assert sum(records[name, "auto"]["mean_us"] for name in bench.OPERATORS[:-1]) == pytest.approx(whole, rel=0.3)


@pytest.mark.parametrize(
    ("layout", "rows"), [("compact", 16384), ("padded", 20480), ("block_sparse", 16384 + 31 * 128)]
)
@pytest.mark.quick("block_sparse-*")
def test_all_steps_lower_for_a_gpu(layout, rows):
    one = (layout,)
    case = small("permute", tokens=8192, hidden=2048, experts=32, dtype="fp16", block=128, layouts=one, split=one)
    shapes = {
        "x": jax.ShapeDtypeStruct((8192, 2048), jnp.float16),
        "logits": jax.ShapeDtypeStruct((8192, 32), jnp.float32),
    }
    (variant,) = variants(case)
    with targeting(get_chip("h200")):
        for step in steps_of(case, variant):
            program = rotated(step.function).trace([tuple(shapes[name] for name in step.inputs)])
            lowered = program.lower(lowering_platforms=("cuda",))
            shapes[step.name] = lowered.out_info[0]
            assert ("mosaic_gpu" in lowered.as_text()) == step.is_timed
    assert shapes[variant.name("pack")].shape[0] == rows

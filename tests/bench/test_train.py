"""The quality bench: what it records, that it resumes exactly, and what it refuses."""

import dataclasses
import importlib.util
import json
import os

import pytest

from bench.command.parser import run
from bench.measure.samples import Interval
from bench.record.files import holding
from bench.train import main
from bench.training.checkpoints import latest_step, open_checkpoints
from bench.training.options import training_parser, variants_of
from bench.training.records import FILE_NAME, Run, read_runs
from bench.training.runs import compile_learner, fit_steps, seconds_a_step, summary, train
from bench.training.settings import Variant
from bench.training.table import summaries, table_rows, warnings_of
from tests.bench.training.tiny_runs import SETTINGS, SIZES, corpus

HEAD = {
    **{"command": "", "chip": "CPU", "commit": "abc", "date": "2026-01-01", "versions": {}, "text": {"sha256": ""}},
    "settings": SETTINGS.record(),
}


class Stopped(Exception):
    """What ends a run before its time."""


def losses(run_: Run) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in (*run_.held_out, *run_.steps)]


@pytest.fixture(scope="module")
def learner():
    return compile_learner(Variant("noisy_top_k"), SETTINGS, corpus())


@pytest.mark.slow
def test_a_run_that_resumes_equals_one_that_was_not_interrupted(tmp_path, learner):
    text = corpus()
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    with open_checkpoints(tmp_path / "whole") as checkpoints:
        assert train(learner, 3, SETTINGS, text, whole, HEAD, checkpoints=checkpoints, checkpoint_every=3)

    def stop(step: int, line: str) -> None:
        assert "tokens/s, drops 0.0 %, load CV" in line
        if step == 5:
            raise Stopped

    with open_checkpoints(tmp_path / "parts") as checkpoints, pytest.raises(Stopped):
        train(learner, 3, SETTINGS, text, parts, HEAD, checkpoints=checkpoints, checkpoint_every=3, show=stop)
    with open_checkpoints(tmp_path / "parts") as checkpoints:
        assert checkpoints.latest == 3
        assert not train(learner, 3, SETTINGS, text, parts, HEAD, checkpoints=checkpoints, is_over=lambda: True)
    with open_checkpoints(tmp_path / "parts") as checkpoints:
        assert checkpoints.latest == 4
        assert train(learner, 3, SETTINGS, text, parts, HEAD, checkpoints=checkpoints)

    expected, found = read_runs(whole)["noisy_top_k-seed3"], read_runs(parts)["noisy_top_k-seed3"]
    assert found.head["resumed_from"] == 4
    assert losses(found) == losses(expected)
    assert [record["step"] for record in found.steps] == list(range(1, 9))
    assert [record["step"] for record in found.held_out] == [0, 4, 8]
    assert found.end is not None
    assert expected.end is not None
    assert found.end["held_out_loss"] == expected.end["held_out_loss"]
    assert not found.end["diverged"]
    # Router, attention, embedding and norms are active, and 2 of the 8 experts.
    routed, total = found.head["expert_parameters"], found.head["parameters"]
    assert found.end["active_parameters"] == total - routed + routed // 4


@pytest.fixture
def one_letter(tmp_path):
    """A text that gives a router of token ids no choice."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 4000)
    return str(path)


@pytest.fixture
def call(tmp_path, one_letter):
    def calling(*arguments: str) -> int:
        return run(main, [*SIZES, "--text", one_letter, "--steps", "4", "--out", str(tmp_path / "out"), *arguments])

    return calling


def test_command(call, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    table = tmp_path / "table.json"
    every = "--checkpoint-every=2"
    assert call("--routers", "hash,softmax", "--seeds", "1", "--json", str(table), every) == 0
    assert latest_step(tmp_path / "out" / "checkpoints" / "hash-seed0") == 4
    out, err = capsys.readouterr()
    # Every token is the same letter, so the hash router sends all to two experts, and says so.
    assert "COLLAPSED" in next(line for line in out.splitlines() if line.startswith("hash"))
    assert (
        "hash collapsed, most tokens go to few experts: seed 0: layer 0 (entropy 0.33), layer 1 (entropy 0.33)" in out
    )
    assert "compiling softmax" in err
    assert "softmax, seed 0, step 4: training loss" in err
    assert "report.html: figures need matplotlib, which is not installed" in err
    routers = {row["router"]: row for row in json.loads(table.read_text())["routers"]}
    assert routers["hash"]["least_entropy"] == pytest.approx(1 / 3, abs=1e-3)
    assert routers["softmax"]["held_out_loss"]["half"] is None

    runs = read_runs(tmp_path / "out" / FILE_NAME)
    assert list(runs) == ["hash-seed0", "softmax-seed0"]
    record = runs["hash-seed0"]
    assert record.head["command"].startswith("python -m bench.train --hidden=16")
    assert record.head["settings"]["steps"] == 4
    assert record.head["causal"] is True
    assert record.held_out[-1]["loss"] < record.held_out[0]["loss"]
    assert [len(layer) for layer in record.held_out[-1]["load"]] == [8, 8]
    assert record.end is not None
    assert record.end["collapsed_layers"] == [0, 1]

    assert record.variant == Variant("hash")
    assert 0 <= record.end["word_accuracy"] <= 1

    # The same can be shown again.
    assert run(main, ["--report", str(tmp_path / "out"), "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["routers"] == json.loads(table.read_text())["routers"]
    assert [len(rows) for rows in shown["over_time"].values()] == [2, 1, 0, 2]

    # What is there is kept unless one says otherwise; a further seed can join it, other settings cannot.
    assert call("--routers", "hash") == 2
    assert "holds 2 runs already; --resume adds to them, --overwrite removes" in capsys.readouterr().err
    assert call("--routers", "hash", "--learning-rate", "0.5", "--resume", "--seeds", "2") == 2
    assert "learning_rate is 0.01 there and 0.5 here" in capsys.readouterr().err
    assert call("--routers", "hash", "--seeds", "2", "--resume") == 0
    again = read_runs(tmp_path / "out" / FILE_NAME)
    assert list(again) == ["hash-seed0", "softmax-seed0", "hash-seed1"]
    assert losses(again["hash-seed0"]) == losses(record)


@pytest.mark.slow
def test_processes_side_by_side_train_the_same(call, tmp_path):
    found = []
    for how in (("--jobs", "1"), ("--jobs", "2"), ("--devices", "2")):
        assert call("--routers", "hash,softmax", "--seeds", "1", *how, "--overwrite") == 0
        runs = read_runs(tmp_path / "out" / FILE_NAME)
        found.append({name: losses(run_) for name, run_ in runs.items()})
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"hash-seed0", "softmax-seed0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routers", "hash,best"], "--routers must be some of all, softmax, "),
        (["--routers", "hash:w4a4"], "a precision must be one of w16a16, w8a8, w8a8g8; got 'w4a4'"),
        (
            ["--routers", "hash", "--precisions", "w8a8"],
            "error: hash-w8a8: precision 'w8a8' does not fit hidden_size=16",
        ),
        (["--devices", "99"], "--devices must be all or a number from 1 to 32, the devices there are; got '99'"),
        (["--report", "/nowhere"], "/nowhere/train.jsonl has no runs: python -m bench.train --out /nowhere makes some"),
        (["--routers", "best"], "got 'best'"),
        (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        (["--minutes", "5"], "--minutes finds the steps, so it goes without --steps"),
        (["--minutes", "nan"], "--minutes: must be a positive number, got 'nan'"),
        (["--look-at", "2,5000"], "--look-at must be at most --steps, "),
        (["--jobs", "0"], "--jobs: must be a whole number of at least 1, got '0'"),
        (["--resume", "--overwrite"], "--resume keeps the runs in --out and --overwrite removes them"),
        (["--length", "500"], "sequences of 500 need at least"),
        (["--batch", "100"], "fewer than a batch of 100"),
        (["--heads", "5"], "error: softmax: hidden_size must be a multiple of 2 · num_heads"),
        (["--top-k", "9"], "error: softmax: top_k must be at most num_experts=8"),
        (["--routers", "hash,softmax:w8a8"], "error: softmax-w8a8: precision 'w8a8' does not fit hidden_size=16"),
        (["--learning-rate", "inf"], "--learning-rate: must be a positive number, got 'inf'"),
        (["--capacity-factor", "inf"], "--capacity-factor: must be a positive number, got 'inf'"),
        (["--intermediate", "0"], "--intermediate: must be a whole number of at least 1, got '0'"),
        (["--evaluations", "0"], "--evaluations: must be a whole number of at least 1, got '0'"),
        (["--out", f"{__file__}/out"], f"--out: cannot write to {__file__}/out: {__file__} is no folder"),
        (["--json", "/nowhere/x.json"], "--json: cannot write /nowhere/x.json: there is no folder /nowhere"),
    ],
)
def test_bad_input_is_a_line_that_says_what_to_do(call, capsys, arguments, message):
    assert call(*arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert not any("compiling" in line for line in err)


def test_routers_and_precisions_make_variants():
    def named(*arguments: str) -> list[str]:
        args = training_parser().parse_args(arguments)
        return [variant.name for variant in variants_of(args.routers, args.precisions)]

    assert named("--routers=hash,softmax:w8a8") == ["hash", "softmax-w8a8"]
    assert named("--routers=hash,switch:w8a8", "--precisions=w16a16,w8a8g8") == ["hash", "hash-w8a8g8", "switch-w8a8"]
    assert named("--routers=all,softmax:w8a8,hash") == [*named(), "softmax-w8a8"]


def test_a_pause_leaves_runs_for_later(call, tmp_path, capsys):
    pause = ["--routers", "hash", "--seeds", "1", "--pause-after"]
    assert call(*pause, "1e-9") == 3
    assert "1 runs are not finished: the same command goes on with --resume" in capsys.readouterr().err
    assert call(*pause, "10") == 0
    assert read_runs(tmp_path / "out" / FILE_NAME)["hash-seed0"].end is not None


def test_a_folder_is_for_one_run_at_a_time(call, tmp_path, capsys):
    with holding(tmp_path / "out"):
        assert call("--routers", "hash") == 2
    assert f"{tmp_path / 'out'} is in use by another run, process {os.getpid()}; wait" in capsys.readouterr().err


def test_records_that_end_before_their_checkpoint_are_refused(call, tmp_path, capsys):
    (tmp_path / "out" / "checkpoints" / "hash-seed0" / "8").mkdir(parents=True)
    assert call("--routers", "hash", "--resume") == 2
    assert "the records of hash-seed0 end at step 0, but its checkpoint is of step 8" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_fit_into_the_time(learner):
    fitted = fit_steps(SETTINGS, [learner, learner], 3, corpus(), 100.0)
    assert fitted == dataclasses.replace(SETTINGS, steps=fitted.steps)
    # A busy machine may be faster or slower the next time, but not by so much.
    assert 10 < fitted.steps * 6 * seconds_a_step(learner, SETTINGS, corpus()) < 1000
    with pytest.raises(ValueError, match="too few steps for 2 looks at the held-out text; pass more minutes"):
        fit_steps(SETTINGS, [learner], 1, corpus(), 1e-6)


def test_checkpoints_without_orbax_are_refused_at_once(call, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "orbax" else found(name))
    assert call("--checkpoint-every", "2") == 2
    assert (
        "checkpoints need orbax-checkpoint, which is not installed: pip install -e '.[train]'"
        in capsys.readouterr().err
    )


def test_lines_that_are_no_records_are_refused(tmp_path):
    path = tmp_path / FILE_NAME
    step = {"kind": "step", "run": "a-seed0", "step": 1, "loss": 2.0, "ms_per_step": 1.0, "drop_rate": 0, "load_cv": []}
    for changes, message in (
        ({}, "line 1: a record of the kind 'step', but the run 'a-seed0' has not begun"),
        ({"kind": "stop"}, "line 1: kind must be one of end, held_out, run, step, got 'stop'"),
        ({"loss": "low"}, "line 1: loss must be a number or null, got 'low'"),
        ({"load_cv": [1.0, None]}, r"line 1: load_cv\[1\] must be a number, got None"),
    ):
        path.write_text(json.dumps(step | changes) + "\n")
        with pytest.raises(ValueError, match=message):
            read_runs(path)


def a_run(loss: float | None, router: str = "softmax", seed: int = 0, precision: str = "w16a16") -> Run:
    head = {
        "router": router,
        "precision": precision,
        "seed": seed,
        "causal": True,
        "parameters": 100,
        "expert_parameters": 80,
    }
    step = {"step": 1, "loss": loss, "ms_per_step": 2.0, "drop_rate": 0.1, "load_cv": [0.5, 0.7]}
    look = {"step": 1, "loss": loss, "load": [[4] * 8] * 2, "tokens": 16, "load_entropy": [1.0, 1.0]}
    look |= {"drop_rate": 0.0, "unrouted_rate": 0.0, "word_accuracy": 0.5, "bracket_accuracy": 0.25}
    run = Run(head, [step], [look])
    run.end = summary(run, SETTINGS)
    return run


def test_a_loss_that_is_not_finite_is_reported():
    broken, sound = a_run(None), a_run(2.0)
    assert broken.end is not None
    assert broken.end["diverged"]
    assert sound.end is not None
    assert sound.end == {**sound.end, "diverged": False, "collapsed": False, "active_parameters": 40, "load_cv": 0.6}
    rows = summaries([broken])
    assert rows[0].held_out_loss is None
    assert table_rows(rows)[0][-1] == "DIVERGED"
    assert warnings_of(rows) == ["softmax diverged with the seeds 0"]


@pytest.mark.parametrize(("losses_", "diverged"), [((2.0, 1.5), False), ((2.0, None), True)])
def test_a_run_diverges_with_its_last_step(losses_, diverged):
    run_ = a_run(2.0)
    steps = [{**run_.steps[0], "step": step, "loss": loss} for step, loss in enumerate(losses_, 1)]
    assert summary(Run(run_.head, steps, run_.held_out), SETTINGS)["diverged"] == diverged


def test_one_slow_step_does_not_make_a_run_slow():
    run_ = a_run(2.0)
    steps = [{**run_.steps[0], "ms_per_step": ms} for ms in (1.0, 1.0, 100.0)]
    figures = summary(Run(run_.head, steps, run_.held_out), SETTINGS)
    assert figures["ms_per_step"] == 1.0
    assert figures["tokens_per_second"] == SETTINGS.batch_size * SETTINGS.length * 1e3


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint():
    run_ = a_run(2.0)
    steps, looks = [{**run_.steps[0], "step": n} for n in (2, 4, 6)], [{**run_.held_out[0], "step": n} for n in (0, 4)]
    resumed = Run(run_.head, steps, looks).resumed({**run_.head, "resumed_from": 3})
    assert [record["step"] for record in (*resumed.steps, *resumed.held_out)] == [2, 0]


def test_losses_are_compared_with_those_of_the_same_seed():
    softmax = [a_run(2.0, seed=0), a_run(1.5, seed=1), a_run(None, seed=2)]
    hashed = [a_run(loss, "hash", seed) for seed, loss in enumerate((1.8, 1.2, 9.0, 1.0))]
    best, baseline = summaries([*softmax, *hashed[:2]])
    assert best.router == "hash"
    assert best.against_baseline == Interval.of([1.8 - 2.0, 1.2 - 1.5])
    assert baseline.against_baseline is None
    in_8_bits = summaries([*softmax, a_run(2.25, seed=0, precision="w8a8")])[1]
    assert (in_8_bits.router, in_8_bits.against_baseline) == ("softmax-w8a8", Interval.of([0.25]))
    with_more = {row.router: row for row in summaries([*softmax, *hashed])}
    assert with_more["hash"].against_baseline == best.against_baseline
    assert summaries(hashed)[0].against_baseline is None

"""bench.cycles: its cases, its command line, and megablox compiled for real where libtpu is installed."""

import dataclasses

import pytest

from bench.cli import run
from bench.cycles import case_record, main, table
from bench.cycles_cases import all_cases, implementations
from bench.libtpu import libtpu_version
from bench.workloads import GemmShape


def test_cases_are_those_of_the_models():
    shapes = {case.name: case.shape for case in all_cases()}
    assert shapes["deepseek-v3 decode gate/up"] == GemmShape(8, 48, 7168, 4096)
    assert shapes["mixtral-8x7b prefill down"] == GemmShape(8, 1024, 14336, 4096)
    assert len(shapes) == 12


def test_only_gate_up_has_a_fused_kernel():
    names = {case.product: set(implementations(case)) for case in all_cases()}
    assert names["gate/up"] - names["down"] == {"ours, fused"}
    assert names["down"] >= {"ours", "megablox"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "deepseek sideways"], "no case has the words 'deepseek sideways'; there are deepseek-v3 decode"),
        (["--chip", "h200"], "invalid choice: 'h200'"),
    ],
)
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_table_marks_guesses_and_says_what_did_not_compile():
    case = {"chip": "v6e", "case": "a case", "shape": dataclasses.asdict(GemmShape(1, 2, 3, 4)), "floor_cycles": 5}
    measured = {"ours": {"cycles": 1234, "is_guess": True}, "megablox": {"cycles": 56, "is_guess": False}}
    lines = table([{**case, "implementations": {**measured, "tokamax": {"reason": "too narrow"}}}]).splitlines()
    assert lines[0].split() == ["chip", "case", "G,M,K,N", "floor", "ours", "megablox", "tokamax"]
    assert lines[2].split() == ["v6e", "a", "case", "1,2,3,4", "5", "~1,234", "56", "no:", "too", "narrow"]


@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (EXTRAS=aot)")
@pytest.mark.timeout(600)
def test_grids_of_a_peer_that_the_data_give_are_fixed(monkeypatch):
    monkeypatch.setattr("bench.cycles.implementations", lambda case: ["megablox"])
    (case,) = [case for case in all_cases() if case.name == "qwen3-30b-a3b decode down"]
    record = case_record(case, "v6e")
    assert record["implementations"]["megablox"]["is_guess"] is False
    assert record["implementations"]["megablox"]["cycles"] > 0.3 * record["floor_cycles"]

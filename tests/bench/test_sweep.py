"""The grids have what they are to have, and a sweep goes on where it stopped."""

import itertools
import os
import subprocess
import sys

import pytest

from bench.command.parser import run
from bench.one_chip.cases import LOADS
from bench.one_chip.layouts import LAYOUTS
from bench.one_chip.sweep_grid import full_grid, quick_grid
from bench.processes.side_by_side import Share
from bench.sweep import main, share_of
from tests.bench.one_chip.small_cases import lines

GRID = itertools.product((8192, 16384, 32768), (2048, 4096), (32, 64, 128), (1, 2, 4))
BATCHES = itertools.product(((32, 128), (64, 256), (128, 512)), (4, 8, 16), (1024, 2048), (1.0, 1.25))


def test_tokens_hidden_experts_and_k():
    cases = full_grid()
    for bench, sizes in itertools.product(("permute", "layer"), GRID):
        assert [c for c in cases if c.bench == bench and (c.tokens, c.hidden, c.experts, c.k) == sizes], sizes


def test_batch_length_experts_hidden_and_capacity():
    layers = [c for c in full_grid() if c.bench == "layer"]
    for (batch, length), experts, hidden, capacity in BATCHES:
        wanted = (batch, length, batch * length, experts, hidden, capacity)
        assert [c for c in layers if (c.batch, c.length, c.tokens, c.experts, c.hidden, c.capacity_factor) == wanted]


@pytest.mark.parametrize("grid", [full_grid, quick_grid])
def test_every_kind_of_record(grid):
    cases = grid()
    assert len({case.key for case in cases}) == len(cases)
    for bench in ("permute", "layer"):
        assert {case.load for case in cases if case.bench == bench} == set(LOADS)
    assert {case.bench for case in cases} == {"topk", "permute", "layer"}
    assert any(case.split == tuple(LAYOUTS) for case in cases if case.bench == "layer")
    assert any(case.with_xla for case in cases if case.bench == "permute")
    assert {case.capacity_factor for case in cases if case.batch} == {1.0, 1.25}


def test_cases_of_the_same_programs_stand_together():
    for grid in (full_grid(), quick_grid()):
        keys = [key for key, _ in itertools.groupby(case.programs_key for case in grid if case.load != "balanced")]
        assert len(keys) == len(set(keys))


def test_a_part_of_the_quick_grid_is_swept_and_not_again(tmp_path, capsys):
    command = ["--quick", "--bench", "topk,permute", "--experts", "8", "--k", "2", "--repeats", "2"]
    command += ["--load", "balanced", "--out", str(tmp_path)]
    assert run(main, [*command, "--minutes", "1e-6"]) == 0
    assert "3 cases left: run the command again" in capsys.readouterr().err
    assert run(main, [*command, "--bench", "permute"]) == 0
    assert {r["bench"] for r in lines(tmp_path / "sweep.jsonl")} == {"permute"}
    assert run(main, command) == 0
    records = lines(tmp_path / "sweep.jsonl")
    assert {r["bench"] for r in records} == {"topk", "permute"}
    assert {(r["experts"], r["k"], r["load"]) for r in records} == {(8, 2, "balanced")}
    assert run(main, command) == 0
    assert lines(tmp_path / "sweep.jsonl") == records


@pytest.mark.slow
def test_processes_side_by_side(tmp_path, capsys):
    command = ["--quick", "--bench", "topk", "--repeats", "2", "--out", str(tmp_path)]
    assert run(main, [*command, "--jobs", "2"]) == 0
    assert {(r["bench"], r["experts"]) for r in lines(tmp_path / "sweep.jsonl")} == {("topk", 8), ("topk", 32)}
    out, err = capsys.readouterr()
    assert out.count("top_k") == 4
    assert {file.name for file in tmp_path.iterdir()} <= {"sweep.jsonl", "report.html", ".held"}
    assert "cases left" not in err


def test_shares_are_all_cases_and_keep_programs_together():
    cases = full_grid()
    shares = [share_of(cases, Share(i, 5)) for i in range(5)]
    assert sorted(case.key for share in shares for case in share) == sorted(case.key for case in cases)
    programs = [{case.programs_key for case in share} for share in shares]
    assert sum(map(len, programs)) == len(set().union(*programs))


def test_loads_of_ones_own(tmp_path, capsys):
    assert run(main, ["--quick", "--list", "--zipf", "1.5", "--text", "book.txt"]) == 0
    keys = capsys.readouterr().out.splitlines()
    assert len(keys) == len(quick_grid())
    assert all(("zipf_exponent=1.5" in key) == ("load=zipf" in key) for key in keys)
    assert all(("text=book.txt" in key) == ("load=text" in key) for key in keys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--quick"], "--out DIR is needed"),
        (["--list", "--tokens", "100"], "--tokens must be among those of the grid, 4096, 8192, 16384, 32768, 65536"),
        (["--list", "--bench", "gemm"], "--bench must be among those of the grid, layer, permute, topk; got gemm"),
        (["--list", "--tokens", "4096", "--bench", "topk"], "no case of the grid has all of the sizes"),
        (["--quick", "--out", "nowhere", "--jobs", "0"], "--jobs: must be a whole number of at least 1, got '0'"),
    ],
)
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("module", ["sweep", "layer", "permute", "topk"])
@pytest.mark.slow
def test_help_has_examples(module):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", f"bench.{module}", "--help"]
    shown = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, check=True).stdout
    assert f"examples:\n  python -m bench.{module} " in shown

"""bench.cycles: its cases, its command line and tables, and megablox compiled for real where libtpu is installed."""

import dataclasses
import json

import pytest

from bench.command.parser import run
from bench.cycles import figure, figures, main, measure, new_row
from bench.model.shapes import GemmShape
from bench.tpu.cycles_cases import (
    ACTIVATION,
    FUSED,
    GUESSED,
    INSTRUCTIONS,
    KINDS,
    MEGABLOX,
    OURS,
    WAITS,
    Case,
    Choice,
    all_cases,
    choices,
    copied_bytes,
)
from bench.tpu.cycles_table import block, over_tokamax, over_unfused, summary, table
from bench.tpu.libtpu import libtpu_version

CASE = Case("a", "decode", "gate/up", GemmShape(2, 48, 256, 512))


def row(instructions=None, **cycles):
    names = {"fused": FUSED, "tokamax": "tokamax v2"}
    found = {
        names.get(name, name): [{"cycles": value} if isinstance(value, int) else {"reason": value}]
        for name, value in cycles.items()
    }
    return {**new_row("v6e", CASE), "floor_cycles": 100, WAITS: found, INSTRUCTIONS: instructions or {}}


def test_cases_are_those_of_the_models():
    shapes = {case.name: case.shape for case in all_cases()}
    assert shapes["deepseek-v3 decode gate/up"] == GemmShape(8, 48, 7168, 4096)
    assert shapes["mixtral-8x7b prefill down"] == GemmShape(1, 1024, 14336, 4096)
    assert shapes["deepseek-v3 prefill gate/up"] == GemmShape(2, 1024, 7168, 4096)
    assert len(shapes) == 12


def test_only_gate_up_has_a_fused_kernel_and_an_activation():
    names = {case.product: set(choices(case, WAITS)) for case in all_cases()}
    assert names["gate/up"] - names["down"] == {FUSED, ACTIVATION}
    assert names["down"] >= {OURS, MEGABLOX}


@pytest.mark.parametrize(
    ("tiles", "elements"),
    [
        # Both groups touch a tile of 64 rows between them: three visits, rows once for each of two column tiles.
        ((64, 256, 256), 2 * 3 * 64 * 256 + 2 * 256 * 512 + 96 * 512),
        ((48, 256, 512), 96 * 256 + 2 * 256 * 512 + 96 * 512),
        ((48, 128, 512), 96 * 256 + 2 * 256 * 512 + 96 * 512),
        ((64, 128, 512), 3 * 64 * 256 + 3 * 256 * 512 + 96 * 512),
    ],
)
def test_copies_follow_from_tiles(tiles, elements):
    assert copied_bytes(Choice(MEGABLOX, tiles), CASE) == 2 * elements
    assert copied_bytes(Choice(OURS), CASE) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "deepseek sideways"], "no case has the words 'deepseek sideways'; there are qwen3-30b-a3b decode"),
        (["--chip", "h200"], "invalid choice: 'h200'"),
        (["--jobs", "0"], "--jobs: must be a whole number of at least 1, got '0'"),
    ],
)
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_ratios_and_the_floor():
    cells = row(ours=80, tokamax=160, fused=76, activation=20)
    assert over_tokamax(cells, WAITS) == 0.5
    assert over_tokamax(cells, WAITS, 100) == 100 / 160
    assert over_tokamax(cells, INSTRUCTIONS) is None
    assert over_unfused(cells) == 0.76
    assert over_unfused(cells, OURS) == 0.8
    assert over_tokamax(row(ours=80, tokamax="no"), WAITS) is None


def test_an_estimate_whose_loops_were_not_followed_does_not_count():
    cells = row({OURS: [{"reason": GUESSED}]}, ours=80, tokamax=160, fused=76, activation=20)
    assert over_tokamax(cells, WAITS) is None
    assert over_unfused(cells) is None
    assert f"no: {GUESSED}" in table([cells])


def test_tables_say_why_there_is_no_figure():
    rows = [row(ours=1234, megablox=56, tokamax="needs more VMEM than there is", fused=900, activation=20)]
    lines = table(rows).splitlines()
    assert lines[0].split()[:5] == ["chip", "case", "G,M,K,N", "figures", "floor"]
    assert "1,234" in lines[2]
    assert "no: needs more VMEM than there is" in lines[2]
    later = {**rows[0], "chip": "v5e", "commit": "def"}
    record = {"rows": [{**rows[0], "commit": "abc"}, later], "versions": {"libtpu": "1", "tokamax": None}}
    text = block({**record, "date": "2026-01-01T", "note": "A note."}, "docs/results/tpu_cycles.json")
    assert "libtpu 1, commit abc and def, 2026-01-01" in text
    assert (
        "| a decode gate/up | 2,48,256,512 | 1 / no: needs more VMEM than there is / 0, floor 0; fused 0.72× | 1"
        in text
    )
    assert "at most 0.9× in 1 of 1 cells" in summary(rows)
    assert "no time at all would make that 0.98× to 0.98×, at most 0.9× in 0." in summary(rows)


def test_choices_are_tried_until_one_has_figures(monkeypatch):
    answers = {"1": {"reason": "no"}, "2": {"cycles": 5}, "3": {"cycles": 4}}
    monkeypatch.setattr("bench.cycles.figure", lambda chip, case, kind, choice, timeout: answers[choice.configuration])
    options = [Choice(MEGABLOX, (tile,)) for tile in (1, 2, 3)]
    assert figures("v6e", CASE, WAITS, options, 9) == [{"reason": "no"}, {"cycles": 5}]


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path):
    asked = []

    def made(chip, case, kind, options, timeout):
        asked.append(options[0].implementation)
        if len(asked) in (3, 4):
            raise KeyboardInterrupt
        return [{"cycles": 1}]

    monkeypatch.setattr("bench.cycles.figures", made)
    path, record = tmp_path / "record.json", {"commit": "abc", "rows": []}
    with pytest.raises(KeyboardInterrupt):
        measure(record, [("v6e", CASE)], path, 1, 9)
    kept = json.loads(path.read_text())
    assert kept["rows"][0]["commit"] == "abc"
    before = sum(len(kept["rows"][0][kind]) for kind in KINDS)
    assert 0 < before < sum(len(choices(CASE, kind)) for kind in KINDS)
    measure(kept, [("v6e", CASE)], path, 1, 9)
    assert all(set(kept["rows"][0][kind]) == set(choices(CASE, kind)) for kind in KINDS)


@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (EXTRAS=aot)")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("choice", "kind"),
    [(Choice(OURS), WAITS), (Choice(OURS), INSTRUCTIONS), (Choice(MEGABLOX, (48, 1024, 512)), WAITS)],
)
@pytest.mark.slow
def test_cycles_grow_with_the_groups(choice, kind):
    """Loops over groups are followed as they would run."""
    few, many = (
        figure("v6e", dataclasses.replace(CASE, shape=GemmShape(groups, 48, 1024, 1024)), kind, choice)["cycles"]
        for groups in (4, 16)
    )
    assert 2.5 < many / few < 4.5

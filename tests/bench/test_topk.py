"""bench.topk compares our top-k with XLA's in pairs."""

import json

import pytest

from bench.command.parser import run
from bench.topk import main
from tests.bench.one_chip.small_cases import lines


def test_ours_and_xlas(tmp_path, capsys):
    sizes = ["--tokens", "64", "--hidden", "32", "--experts", "4", "--repeats", "2"]
    assert run(main, [*sizes, "--load", "text", "--out", str(tmp_path), "--json", "-"]) == 0
    ours, xla = records = lines(tmp_path / "topk.jsonl")
    assert json.loads(capsys.readouterr().out) == records
    assert (ours["operator"], ours["layout"], ours["drop_rate"], ours["tflops"]) == ("top_k", None, None, None)
    assert ours["hbm_gb_per_s"] * ours["mean_us"] * 1e3 == pytest.approx(4 * 64 * (4 + 2 * 2))
    assert (ours["backend"], xla["backend"]) == ("auto", "xla")
    assert ours["paired"] is None
    assert xla["paired"]["backend"] == "auto"
    assert xla["paired"]["difference_us"] == pytest.approx(xla["mean_us"] - ours["mean_us"])
    assert 0 < ours["load_entropy"] < 1

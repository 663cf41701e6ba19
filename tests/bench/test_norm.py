"""bench.norm compares our norms with XLA's in pairs."""

import json

import pytest

from bench.command.parser import run
from bench.norm import main


def test_every_operator(capsys):
    assert run(main, ["--tokens", "16", "--hidden", "128", "--repeats", "2", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    records = {record["operator"]: record for record in found["records"]}
    assert list(records) == ["norm", "sum and norm", "sum and norm, 8 bits", "backward"]
    assert found["command"].startswith("python -m bench.norm")
    rows = 16 * 128
    assert records["norm"]["hbm_bytes"] == rows * 4 + 128 * 4
    assert records["sum and norm, 8 bits"]["hbm_bytes"] == rows * 7 + 4 * (16 + 128)
    for record in records.values():
        assert record["difference_us"] == pytest.approx(record["ours"]["mean_us"] - record["xla"]["mean_us"])
        assert record["error"] < 1e-6  # on a CPU both are XLA's


def test_widths_that_8_bits_cannot_have(capsys):
    assert run(main, ["--hidden", "2880"]) == 2
    assert "multiples of 128" in capsys.readouterr().err

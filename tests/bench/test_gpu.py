"""The command line, and the record of a run with made-up measurements."""

import gc
import json

import jax
import pytest

from bench import gpu
from bench.command.parser import run
from bench.hopper.cases import CASES
from bench.measure import devices
from pallas_kernels.chips import get_chip
from tests.bench.hopper.gpu_records import CEILINGS, measurement


@pytest.fixture
def outcomes(monkeypatch):
    """Stands in for an H200: our µs of each case, 1 where none is given."""
    given = {}

    def measure_case(case, *, repeats, with_peers):
        peers = {"jax.lax.ragged_dot": measurement(100.0), "tokamax.ragged_dot": {"error": "tokamax is not installed"}}
        outcome = given.get(case.name, 1.0)
        if isinstance(outcome, Exception):
            raise outcome
        return measurement(outcome), (peers if with_peers else {})

    monkeypatch.setattr(gpu, "require_nvidia_gpu", lambda: None)
    monkeypatch.setattr(devices, "chip_of", lambda device: get_chip("h200"))
    monkeypatch.setattr(gpu, "measure_ceilings", lambda repeats: CEILINGS)
    monkeypatch.setattr(gpu, "measure_case", measure_case)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return given


def test_help_shows_examples_and_cases(capsys):
    with pytest.raises(SystemExit, match="0"):
        gpu.main(["--help"])
    out = capsys.readouterr().out
    assert "python -m bench.gpu --cases decode-fp8,down-fp8 --quick" in out
    assert all(name in "".join(out.split()) for name in CASES)  # wherever it breaks lines


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_is_one_line(capsys):
    assert run(gpu.main, ["--cases", "decode-fp8"]) == 2
    assert capsys.readouterr() == ("", "error: kernel times need an NVIDIA GPU, and jax runs on cpu here\n")


def test_a_wrong_case_needs_no_gpu(capsys):
    assert run(gpu.main, ["--cases", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown case 'x' in --cases; expected some of decode-fp8,")


def test_a_device_without_a_row_is_an_error(outcomes, monkeypatch, capsys):
    monkeypatch.setattr(devices, "chip_of", lambda device: None)
    assert run(gpu.main, []) == 2
    assert capsys.readouterr().err == "error: pallas_kernels/chips.py has no row for 'cpu'; add one\n"


def test_record(outcomes, capsys):
    assert run(gpu.main, ["--json", "-", "--commit", "abc"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert set(record) == {"what", "command", "chip", "driver", "versions", "commit", "date", "ceilings", "cases"}
    assert (record["commit"], record["versions"]["jax"]) == ("abc", jax.__version__)
    assert record["command"] == "python -m bench.gpu --json - --commit abc"
    assert record["ceilings"] == {"read_bandwidth": 4.65e12, "bf16_flops": 794e12, "fp8_flops": 1392e12}
    assert list(record["cases"]) == list(CASES)
    assert all(case["met"] for case in record["cases"].values())
    assert "decode-fp8: 1.0 µs; jax.lax.ragged_dot 100.0" in err
    assert f"no figures of tokamax.ragged_dot ({', '.join(CASES)}): tokamax is not installed" in err


def test_a_missed_bar_and_a_failure_are_listed_and_the_rest_goes_on(outcomes, tmp_path, capsys):
    outcomes.update({"decode-fp8": 40.0, "decode-bf16": MemoryError("out of\nmemory")})
    path = tmp_path / "h200.json"
    assert run(gpu.main, ["--json", str(path), "--quick"]) == 1
    out, err = capsys.readouterr()
    failed = [line for line in err.splitlines() if line.startswith("FAILED: ")]
    assert failed == [
        "FAILED: decode-fp8: 40.0 µs, the bar is ≤ 32 µs",
        "FAILED: decode-bf16: MemoryError: out of memory",
    ]
    assert len(json.loads(path.read_text())["cases"]) == len(CASES)
    assert "ragged_dot" not in out


def test_no_peers(outcomes, capsys):
    assert run(gpu.main, ["--cases", "down-fp8", "--no-peers"]) == 0
    out, err = capsys.readouterr()
    assert "ragged_dot" not in out + err


def test_markdown(outcomes, capsys):
    assert run(gpu.main, ["--cases", "down-fp8", "--md"]) == 0
    _, head, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| case |")
    assert row.startswith("| down-fp8 | 8,48,2048,7168 | 1.0 |")

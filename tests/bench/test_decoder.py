"""The command line of bench.decoder, on reduced sizes."""

import json

import pytest

from bench import decoder
from bench.blocks import in_torch, measure
from bench.command.parser import run


def outcome(us: float) -> dict:
    return {"relative_error": 0.0, "us": us, "min_us": us, "spread_us": 0.0, "tokens_per_s": 1e6 / us, "tflops": 0.5}


@pytest.fixture
def made_up(monkeypatch):
    """Stands in for measurements: the outcomes of the contenders, or what is raised, for each case in turn."""
    given = []

    def measure_case(case, *, rounds, at_most, with_torch):
        contenders = given.pop(0)
        if isinstance(contenders, Exception):
            raise contenders
        return {"shape": case.shape, "contenders": contenders}

    monkeypatch.setattr(decoder, "measure_case", measure_case)
    monkeypatch.setattr(decoder.jax, "clear_caches", lambda: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return given


def test_help_shows_examples_and_cases(capsys):
    with pytest.raises(SystemExit, match="0"):
        decoder.main(["--help"])
    out = capsys.readouterr().out
    assert "python -m bench.decoder --cases tiny,bert-base,wide-8x128" in out
    assert "decode-deepseek-v3-64" in "".join(out.split())  # wherever it breaks lines


def test_a_wrong_case_is_one_line(capsys):
    assert run(decoder.main, ["--cases", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown case 'x' in --cases")


@pytest.mark.parametrize("name", ["tiny", "decode-qwen3-30b-a3b-8"])
@pytest.mark.quick("decode*")
def test_a_record(name, monkeypatch, capsys):
    monkeypatch.setattr(in_torch, "why_not", lambda case: pytest.fail("torch is asked for"))
    monkeypatch.setattr(decoder.jax, "clear_caches", lambda: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert run(decoder.main, ["--quick", "--no-torch", "--cases", name, "--json", "-", "--commit", "abc"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["commit"], record["reduced"], record["precision"]) == ("abc", True, "w16a16")
    case = record["cases"][name]
    assert case["hidden_size"] == 128
    assert set(case["contenders"]) == set(measure.CONTENDERS)
    for contender in (measure.OURS, measure.JAX):
        figures = case["contenders"][contender]
        assert 0 <= figures["relative_error"] < 3e-2
        assert figures["tokens_per_s"] == pytest.approx(case["tokens"] / figures["us"] * 1e6)
        assert figures["tflops"] == pytest.approx(case["flops"] / figures["us"] / 1e6)
    assert f"no figures of torch eager ({name}): not asked for" in err


def test_failures_are_listed_and_the_rest_goes_on(made_up, tmp_path, capsys):
    absent = {"error": "torch is not installed"}
    whole = {"ours": outcome(20.0), "plain jax": outcome(30.0), "torch eager": absent, "torch.compile": outcome(50.0)}
    made_up += [whole, {**whole, "ours": {"error": "ValueError: wrong result"}}, MemoryError("out of\nmemory")]
    path = tmp_path / "blocks.json"
    assert run(decoder.main, ["--cases", "tiny,bert-base,bert-large", "--json", str(path)]) == 1
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()[-3:]
    assert "30.0 (1.50×)" in first
    assert "50.0 (2.50×)" in first
    assert "failed" in second
    assert "50.0 " not in third
    assert [line for line in err.splitlines() if line.startswith("FAILED: ")] == [
        "FAILED: bert-base, ours: ValueError: wrong result",
        "FAILED: bert-large: MemoryError: out of memory",
    ]
    assert "no figures of torch eager (tiny, bert-base): torch is not installed" in err
    assert len(json.loads(path.read_text())["cases"]) == 3

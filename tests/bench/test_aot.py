"""bench.aot: its command line, its table, and one layer compiled for real where libtpu is installed."""

import dataclasses
import json
import subprocess
import sys

import pytest

from bench.aot import compile_record, main
from bench.command.parser import run
from bench.tpu.aot_layer import LayerJob
from bench.tpu.libtpu import CompileError, libtpu_version, reason_of, run_job

needs_libtpu = pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (EXTRAS=aot)")

SMALL = ["--topology", "v6e:2x2", "--model", "mixtral-8x7b", "--ep", "4", "--reduce", "16", "--batch", "64"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of the arguments --topology --all is required"),
        (["--all", "--topology", "v6e:4x8"], "not allowed with argument"),
        (["--topology", "v9:4x8"], "unknown topology 'v9:4x8'; expected a TPU and the shape of a slice"),
        (["--topology", "v6e:4x8", "--model", "gpt-5"], "unknown model 'gpt-5'"),
        (["--topology", "v6e:4x8", "--precision", "w4a4"], "precision must be 'w16a16' or 'w8a8', got 'w4a4'"),
        (["--topology", "v6e:2x2", "--ep", "32"], "ep=32 does not fit v6e:2x2: it has 4 devices"),
        (["--topology", "v6e:4x8", "--ep", "7"], "num_experts=256 is not divisible by ep=7"),
        (["--topology", "v6e:4x8", "--batch", "33"], "batch must be a positive multiple of the 32 devices"),
        (["--topology", "v6e:4x8", "--reduce", "5"], "hidden_size=7168 is not divisible by the reduction 5"),
        (["--topology", "v6e:4x8", "--weights", "int4"], "invalid choice: 'int4'"),
        (["--all", "--ep", "512"], "no slice of v5e with 512 devices is known"),
    ],
)
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m bench.aot --all" in capsys.readouterr().out


def test_why_a_compiler_died():
    log = "WARNING: something\nF1121 llo.cc:76] Check failed: TakeStatus() is OK (INTERNAL: …)\n    @ 0x7f stack\n"
    assert reason_of(log).startswith("F1121 llo.cc:76] Check failed")
    assert reason_of("") == "no reason given"


def test_a_job_that_dies_or_fails_says_why():
    with pytest.raises(CompileError, match=r"ended with status 1: .*no_such_module"):
        run_job("bench.no_such_module", {})
    with pytest.raises(CompileError, match="KeyError"):
        run_job("bench.tpu.aot_layer", {})


@needs_libtpu
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_small_layer_compiles_and_is_shown(tmp_path):
    path = tmp_path / "aot.json"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bench.aot", *SMALL, "--precision", "w16a16", "--json", str(path)],
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["ok"]
    assert record["fits_hbm"]
    # 2 of the 8 experts, and the router in float32.
    hidden, width = 4096 // 16, 14336 // 16
    weights = 2 * 3 * hidden * width * 2 + hidden * 8 * 4
    tokens = 16 * hidden * 2
    assert weights + tokens <= record["memory"]["argument_bytes"] < 1.2 * (weights + tokens) + 65536
    assert {each["kind"] for each in record["collectives"]} >= {"all-to-all"}
    assert {kernel["name"] for kernel in record["kernels"]} >= {"dispatch", "combine"}
    assert all(kernel["cycles"] > 0 for kernel in record["kernels"] if kernel["name"] in ("dispatch", "combine"))
    assert record["versions"]["libtpu"] == libtpu_version()
    for text in ("v6e:2x2", "all-to-all", "Pallas kernel", "cycles leave out loops", "roofline µs", "libtpu"):
        assert text in done.stdout


@needs_libtpu
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_what_cannot_be_compiled_gives_the_compilers_reason():
    job = LayerJob("v5e:2x2", "llama-4-maverick", ep=4, batch=4, precision="w16a16", grad=True)
    record = compile_record(job, with_cycles=False)
    assert not record["ok"]
    assert "RESOURCE_EXHAUSTED" in record["reason"]
    assert "\n" not in record["reason"]
    assert record["job"] == dataclasses.asdict(job)


@needs_libtpu
@pytest.mark.slow
def test_what_is_compiled_stays_when_the_rest_is_stopped(tmp_path, monkeypatch):
    path = tmp_path / "aot.json"

    def stopped_at_the_second(job, **kwargs):
        if path.exists():
            raise KeyboardInterrupt
        return compile_record(job, **kwargs)

    monkeypatch.setattr("bench.aot.compile_record", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--precision", "w16a16", "--precision", "w8a8", "--no-kernel-cycles", "--json", str(path)])
    (record,) = json.loads(path.read_text())
    assert record["job"]["precision"] == "w16a16"

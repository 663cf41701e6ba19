"""bench.decode as a user runs it: on virtual devices, over two processes, with good and bad arguments."""

import json
import os
import socket
import subprocess
import sys

import pytest

from bench.command.parser import run
from bench.decode import main

SMALL = ["--model", "mixtral-8x7b", "--batch", "48", "--reduce", "16", "--ep", "8"]


def start(*args: str) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "bench.decode", *args]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
def test_step_on_virtual_devices(tmp_path):
    path = tmp_path / "evaluation.json"
    status, out, err = finish(start(*SMALL, "--precision", "w16a16", "--json", str(path)))
    assert status == 0, err
    assert "8 virtual CPU devices" in err
    assert "equals the dense oracle" in out
    assert json.loads(path.read_text())["measured"]["relative_error"] < 1e-2


def test_two_processes_check_model_and_write_a_step(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 3)
    path = tmp_path / "evaluation.json"
    common = [*SMALL, "--chip", "tier6", "--input", str(text), "--json", str(path)]
    common += ["--coordinator", address, "--num-processes", "2"]
    first, second = (start(*common, "--process-id", str(i)) for i in range(2))
    (status, out, err), (other_status, other_out, other_err) = finish(first), finish(second)
    assert (status, other_status) == (0, 0), err + other_err
    assert "2 of 2 processes here" in err
    assert "measured" not in other_out  # the collectives' own library prints a line or two
    assert "equals the dense oracle" in out
    for operator in ("gate", "routed_gate_proj", "routed_up_proj", "routed_down_proj", "dispatch", "combine"):
        assert f"\n{operator} " in out
    evaluation = json.loads(path.read_text())
    assert {"run_info", "config", "performance", "measured"} <= evaluation.keys()
    measured = evaluation["measured"]
    assert measured["relative_error"] < 1e-2
    assert measured["dropped"] == 0
    assert sum(measured["tokens_per_expert"]) == 48 * 2
    assert measured["width_reduction"] == 16
    assert measured["transport"] == "auto"
    assert measured["stages_us"].keys() == {"gate", "dispatch", "routed_gate_up", "routed_down", "combine"}
    assert min(measured["stages_us"].values()) > 0
    assert evaluation["config"]["hidden_size"] == 4096  # the model's own; only the run was reduced


@pytest.mark.slow
def test_json_on_standard_output_is_all_there_is():
    status, out, err = finish(start(*SMALL, "--capacity-factor", "0.5", "--json", "-"))
    assert status == 0 or "FAILED" in err
    assert json.loads(out)["measured"]["dropped"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "gpt-5"], "unknown model 'gpt-5'; expected one of deepseek-v3"),
        (["--chip", "v9"], "unknown chip 'v9'; expected one of v5e"),
        (["--chip", "cores=64,tflops=x,gbps=1"], "tflops must be a positive number, got 'x'"),
        (["--precision", "w4a4"], "precision must be 'w16a16' or 'w8a8', got 'w4a4'"),
        (["--ep", "7"], "num_experts=256 is not divisible by ep=7; choose ep among 1, 2, 4"),
        (["--ep", "0"], "--ep: must be a whole number of at least 1, got '0'"),
        (["--reduce", "0"], "--reduce: must be a whole number of at least 1, got '0'"),
        (["--json", os.path.dirname(__file__)], "it is a folder; give a file that can be written"),
        (["--batch", "100"], "--batch must be a multiple of --ep 32, got 100; try 128"),
        (["--batch", "0"], "--batch: must be a whole number of at least 1, got '0'"),
        (["--batch", str(32 * 10**18)], f"--batch: must be a whole number of at most {2**63 - 1}, got '32000"),
        (["--capacity-factor", "-1"], "--capacity-factor: must be a positive number, got '-1'"),
        (["--capacity-factor", "inf"], "--capacity-factor: must be a positive number, got 'inf'"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--input", "/nowhere"], "--input /nowhere: cannot be read: No such file or directory"),
        (["--input", os.devnull], f"--input {os.devnull}: has 0 bytes"),
        (["--batch", "many"], "--batch: must be a whole number of at least 1, got 'many'"),
        (["--rounding", "floor"], "rounding must be 'round' (DS_TPU) or 'ceil' (Tier6), got 'floor'"),
    ],
)
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "kimi-k2", "--ep", "384", "--batch", "384"], "at most 256 virtual ones"),
        (["--coordinator", "localhost:1"], "--coordinator, --num-processes and --process-id go together"),
        ([*SMALL, "--reduce", "64"], "--reduce 64 divides the widths by 64, which do not fit then: precision 'w8a8'"),
        ([*SMALL, "--reduce", "5"], "hidden_size=4096 is not divisible by the reduction 5"),
    ],
)
@pytest.mark.slow
def test_bad_arguments_that_devices_reveal(args, message):
    status, out, err = finish(start(*args))
    assert status == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err

"""bench.decode as a user runs it: on virtual devices, over two processes, with good and bad arguments."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from bench.command.parser import run
from bench.decode import main

SMALL = ["--model", "mixtral-8x7b", "--batch", "48", "--reduce", "16", "--ep", "8"]

MODELLED = ["--model", "deepseek-v3.2", "--model-only", "--json", "-"]


def start(*args: str) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "bench.decode", *args]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
def test_step_on_virtual_devices_with_spare_slots(tmp_path):
    path, text = tmp_path / "evaluation.json", tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 3)
    options = ["--precision", "w16a16", "--json", str(path), "--input", str(text), "--spare-slots", "8"]
    status, out, err = finish(start(*SMALL, *options))
    assert status == 0, err
    assert "8 virtual CPU devices" in err
    assert "equals the dense oracle" in out
    measured = json.loads(path.read_text())["measured"]
    assert measured["relative_error"] < 1e-2
    replicated = measured["replicated"]
    assert sorted(set(replicated["experts"])) == list(range(8))
    assert len(replicated["experts"]) == 16
    assert replicated["difference"] < 1e-2
    assert 12 <= replicated["busiest_rows"] <= measured["busiest_rows"]  # 12 is the mean of 48 · 2 over 8 chips
    assert "with 8 spare slots" in out
    assert "the layer with this text's load and spare slots: " in out


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
    assert (measured["transport"], measured["carried_by"]) == ("auto", "dense")
    assert measured["stages_us"].keys() == {"gate", "dispatch", "routed_gate_up", "routed_down", "combine"}
    assert min(measured["stages_us"].values()) > 0
    assert evaluation["config"]["hidden_size"] == 4096  # the model's own; only the run was reduced
    assert "whole step" in out
    assert "step of the whole model, batch 48, kv 8192" in out
    assert "layer_tps" in evaluation["performance"]


def test_the_step_of_the_v32_run_in_seconds_without_devices(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", None)
    path = tmp_path / "evaluation.json"
    run_of = ["--layers", "all", "--kv-len", "8192", "--batch", "1536", "--ep", "32", "--chip", "v32-run"]
    assert run(main, [*MODELLED, *run_of]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["performance"]["tps"] == pytest.approx(125443.61165772189, rel=1e-14)
    assert evaluation["run_info"]["moe_model"] == "deepseek-v3.2"
    assert run(main, [*MODELLED, *run_of, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["performance"] == evaluation["performance"]
    out = capsys.readouterr().out
    assert "12,244.5 µs, of which dispatch and combine 1,193.8 µs" in out
    assert "125,443.6, 3,920.1 a chip, 81.67 a user" in out
    assert "61.1% by DS_TPU's count, in which the embedding's lookup is a product of 89.0 GFLOP; 60.2% without" in out
    assert "\nMLA            61" in out


def test_a_sweep_over_batches_and_cache_lengths(tmp_path, capsys):
    path = tmp_path / "evaluation.json"
    sweep = ["--batch", "64,256,1536", "--kv-len", "1024,8192", "--chip", "h200", "--layers", "all"]
    assert run(main, [*MODELLED, *sweep, "--json", str(path)]) == 0
    table = capsys.readouterr().out
    evaluations = json.loads(path.read_text())
    cases = [(e["config"]["kv_len"], e["config"]["batch_size"]) for e in evaluations]
    assert cases == [(kv, batch) for kv in (1024, 8192) for batch in (64, 256, 1536)]
    for evaluation in evaluations:
        assert f"{evaluation['performance']['tps_per_chip']:,.3f}" in table
    first = table.splitlines()[3].split()
    performance = evaluations[0]["performance"]
    kept = (performance["weight_bytes"] + performance["cache_bytes"]) / 1e9
    shown = [performance["total_elapse_us"], performance["tps"], performance["tps_per_chip"]]
    shown += [performance["tps_per_batch"], 100 * performance["mfu_without_lookup"], kept]
    assert first == ["1,024", "64", *(f"{value:,.3f}" for value in shown), "memory"]
    assert "does not fit" not in table
    assert run(main, [*MODELLED, *sweep, "--batch", "1536", "--kv-len", "131072", "--json", str(path)]) == 0
    assert "141.0 GB: TOO MUCH" in capsys.readouterr().out


def test_tables_of_a_step(tmp_path, capsys):
    """Every figure of one table, and of the summary, against the JSON."""
    path = tmp_path / "evaluation.json"
    asked = ["--layers", "all", "--batch", "64", "--kv-len", "1024", "--chip", "h200", "--json", str(path)]
    assert run(main, [*MODELLED, *asked]) == 0
    out = capsys.readouterr().out
    performance = json.loads(path.read_text())["performance"]
    for name, layer in performance["layers"].items():
        perf, count = layer["perf"], layer["count"]
        whole = count * perf["elapse"]
        times = [perf["comp_elapse"], perf["dma_elapse"]]
        shown = [*times, perf["elapse"], whole, 100 * whole / performance["total_elapse_us"]]
        comp, dma, *rest = (f"{value:,.3f}" for value in shown)
        (line,) = [line.split() for line in out.splitlines() if line.split()[:2] == [name, str(count)]]
        assert (line[2:4], line[5:]) == ([comp, dma], [*rest, layer["bound"]])
    gigabytes = f"weights {performance['weight_bytes'] / 1e9:,.1f} GB, cache {performance['cache_bytes'] / 1e9:,.1f} GB"
    assert f"{gigabytes}, of 141.0 GB\n" in out


def test_chips_that_share_the_width_of_experts_have_sequences_of_their_own(capsys):
    for more, local in (([], 48), (["--dp", "8"], 192)):
        assert run(main, [*MODELLED, "--ep", "8", "--moe-tp", "4", *more]) == 0
        performance = json.loads(capsys.readouterr().out)["performance"]
        assert performance["layers"]["MoE"]["arch"]["batch_size_local"] == local


def test_the_curve_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    svg = tmp_path / "curve.svg"
    sweep = ["--batch", "64,1536", "--kv-len", "1024,8192", "--chip", "h200", "--layers", "all", "--svg", str(svg)]
    assert run(main, [*MODELLED, *sweep]) == 0
    text = svg.read_text()
    assert text.startswith("<svg")
    parts = "deepseek-v3.2", "kv 1024", "kv 8192", "1536", "tokens/s a chip", "tokens/s a user"
    assert all(part in text for part in parts)


def test_a_curve_needs_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(main, [*MODELLED, "--layers", "all", "--svg", str(tmp_path / "curve.svg")]) == 2
    assert "figures need matplotlib, which is not installed" in capsys.readouterr().err


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
        (["--chip", "cores=64,tflops=x,gbps=1"], "tflops must be a number from 1e-09 to 1e+09, got 'x'"),
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
        (["--batch", "64,128"], "several --batch can be modelled and not run here: add --model-only"),
        (["--kv-len", "1024,8192"], "several --kv-len can be modelled and not run here: add --model-only"),
        (["--kv-len", "0"], "--kv-len: must be a whole number of at least 1, got '0'"),
        (["--q-len", "2"], "--q-len can be modelled and not run here: add --model-only"),
        (["--spare-slots", "33"], "--spare-slots must be a multiple of --ep 32 up to 7936, got 33"),
        ([*MODELLED, "--spare-slots", "32"], "--spare-slots is of a real run, which --model-only leaves out: drop one"),
        (["--svg", "curve.svg"], "--svg can be modelled and not run here: add --model-only"),
        (["--layers", "mamba"], "--layers: invalid choice: 'mamba' (choose from"),
        (["--chip", "cores=64,tflops=768,gbps=8601.6"], "gbps=8601.6' has no link figure, and tokens travel"),
        ([*MODELLED, "--reduce", "2"], "--reduce is of a real run, which --model-only leaves out: drop one"),
        (
            [*MODELLED, "--coordinator", "a:1"],
            "--coordinator is of a real run, which --model-only leaves out: drop one",
        ),
        ([*MODELLED, "--kv-len", "1,2"], "several --kv-len are for steps of the whole model: add --layers all"),
        ([*MODELLED, "--batch", "64,128"], "several --batch are for steps of the whole model: add --layers all"),
        ([*MODELLED, "--svg", "x.svg"], "--svg is for steps of the whole model: add --layers all"),
        ([*MODELLED, "--layers", "all", "--svg", "-"], "--svg must be a file of its own, got '-'"),
        ([*MODELLED, "--layers", "all", "--svg", "x", "--json", "x"], "--svg must be a file of its own, got 'x'"),
        ([*MODELLED, "--dp", "64"], "--dp must divide the 32 chips (--ep times --moe-tp), got 64"),
        ([*MODELLED, "--batch", "100", "--dp", "8"], "--batch must be a multiple of --dp 8, got 100; try 104"),
        (
            [*MODELLED, "--batch", "3200000000"],
            "is 100000000 tokens a chip, and DS_TPU's search of",
        ),
        ([*MODELLED, "--chip", "cores=1e18,tflops=768,gbps=1,link=1"], "cores must be a whole number from 1 to 4096"),
        ([*MODELLED, "--json", ""], "--json: must name a file, got ''"),
        (
            [*MODELLED, "--kv-len", "8", "--q-len", "9"],
            "--kv-len must count the step's own tokens, --q-len 9 at least, got 8",
        ),
        ([*MODELLED, "--moe-tp", "3"], "--moe-tp must divide the widths 2048 and 7168 of deepseek-v3.2, got 3"),
        ([*MODELLED, "--batch", "100"], "--batch must be a multiple of the chips, --ep times --moe-tp = 32, got 100"),
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

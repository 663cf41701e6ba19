"""bench.comm as a user runs it, on virtual devices."""

import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import bench.comm
from bench.comm import main
from bench.command.parser import run
from bench.exchange.records import read_lines
from bench.measure.devices import Devices
from bench.one_chip.cases import Case
from bench.one_chip.loads import logits_of, make_load
from sharding.exchange.dense import Dense
from sharding.exchange.pick import TRANSPORTS, on_one_axis

EP = 4
TINY = ["--ep=4", "--hidden=128", "--experts=8", "--top-k=2", "--repeats=2", "--tokens=4"]


@pytest.fixture
def virtual(monkeypatch):
    """The tests' own devices, as they cannot be made anew in this process."""

    def start(num_devices, **_):
        return Devices(tuple(jax.devices("cpu")[: num_devices or 8]), True, f"{num_devices or 8} virtual CPU devices")

    monkeypatch.setattr(bench.comm, "start", start)


def rows_of_text():
    """Rows for other chips in all, and those that the busiest chip sends or receives, choice by choice."""
    load = make_load(Case("topk", tokens=EP * 4, experts=8, k=2, hidden=128, load="text"))
    ids = np.asarray(jax.lax.top_k(logits_of(load), 2)[1])
    sent, received = [0] * EP, [0] * EP
    for token, choices in enumerate(ids):
        for expert in choices:
            if token // 4 != expert // 2:
                sent[token // 4] += 1
                received[expert // 2] += 1
    return sum(sent), max(*sent, *received)


@pytest.mark.usefixtures("virtual")
def test_a_transport_and_a_bare_collective_side_by_side(tmp_path, capsys, monkeypatch):
    path = tmp_path / "comm.json"
    where = ["--json", str(path), "--out", str(tmp_path), "--commit=abc"]
    monkeypatch.setattr(bench.comm, "BARE", ("lax.all_to_all",))
    assert run(main, [*TINY, "--load=text", "--transport=ragged", *where]) == 0
    out, err = capsys.readouterr()
    records = json.loads(path.read_text())
    assert read_lines(tmp_path / "comm.jsonl") == records
    names = ["ragged", "lax.all_to_all"]
    assert [record["movement"] for record in records] == names
    assert [line.split()[3] for line in out.splitlines()[2:]] == names
    for record in records:
        assert (record["error"], record["commit"], record["ep"], record["tokens"]) == (None, "abc", EP, 4)
        assert record["is_virtual"]
        assert record["versions"]["jax"] == jax.__version__
        both = record["together"]
        # FP8 with a scale there, BF16 back. Balanced are 8 choices of each chip, 2 for each.
        abroad, busiest = (EP * 6, 6) if record["movement"] == "lax.all_to_all" else rows_of_text()
        assert record["send"]["needed_bytes"] == abroad * (128 + 4)
        assert record["give_back"]["busiest_bytes"] == busiest * 256
        assert both["needed_bytes"] == abroad * (132 + 256)
        assert both["gb_per_s"] == pytest.approx(both["busiest_bytes"] / both["median_us"] / 1e3)
        assert both["link_share"] is None
        assert both["min_us"] <= both["median_us"] <= both["min_us"] + both["spread_us"]
    assert "4 virtual CPU devices; wall time, 2 calls in a program, 2 repeats" in err
    assert "[ 50 %" in err


class Broken(Dense):
    def carry_back(self, rows, plan, way):
        return 2 * super().carry_back(rows, plan, way)


@pytest.mark.slow
@pytest.mark.usefixtures("virtual")
def test_a_transport_that_is_wrong_is_no_figure_and_status_1(monkeypatch, capsys):
    monkeypatch.setitem(TRANSPORTS, "broken", Broken())
    monkeypatch.setattr(bench.comm, "BARE", ())
    assert run(main, [*TINY, "--load=text", "--transport=broken", "--json=-"]) == 1
    out, err = capsys.readouterr()
    (record,) = json.loads(out)
    assert (record["send"], record["together"]) == (None, None)
    assert "wrong result: relative error 1.0e+00" in record["error"]
    assert "FAILED: broken, load text, 4 tokens: ValueError: wrong result" in err


@pytest.mark.slow
@pytest.mark.usefixtures("virtual")
def test_the_layer_beside_that_of_one_chip(capsys):
    args = [
        *TINY,
        "--model=qwen3-30b-a3b",
        "--reduce=1",
        "--load=zipf",
        "--transport=dense",
        "--with-layer",
        "--json=-",
    ]
    assert run(main, args) == 0
    dense, *bare = json.loads(capsys.readouterr().out)
    assert dense["layer_us"] > 0
    assert dense["exposed_us"] == dense["layer_us"] - dense["one_chip_us"]
    assert [record["layer_us"] for record in bare] == [None, None]


@pytest.mark.usefixtures("virtual")
def test_one_chip_is_timed_once_a_case(monkeypatch, capsys):
    times = iter([100.0, 200.0])
    over_chips = {"dense": 260.0, "ragged": 310.0}
    monkeypatch.setattr(bench.comm, "BARE", ())
    monkeypatch.setattr(bench.comm, "measure", lambda *_, **__: {})
    monkeypatch.setattr(bench.comm, "step_records", lambda *_: dict.fromkeys(bench.comm.STEPS))
    monkeypatch.setattr(bench.comm, "time_on_one_chip", lambda *_, **__: next(times))
    monkeypatch.setattr(bench.comm, "time_over_chips", lambda _, name, **__: over_chips[name])
    options = ["--tokens=4,8", "--load=balanced", "--transport=dense,ragged", "--with-layer", "--json=-"]
    assert run(main, [*TINY[:-1], *options]) == 0
    found = [(r["layer_us"], r["one_chip_us"], r["exposed_us"]) for r in json.loads(capsys.readouterr().out)]
    assert found == [(260, 100, 160), (310, 100, 210), (260, 200, 60), (310, 200, 110)]


def start(*args):
    command = [sys.executable, "-W", "error", "-m", "bench.comm", *TINY, *args]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_as_a_command_with_devices_of_its_own():
    process = start("--load=text")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "4 virtual CPU devices" in err
    assert out.count(" text ") == len(on_one_axis()) + 2


def start_two(*args):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = [*args, "--transport=dense", "--timeout=120", "--coordinator", address, "--num-processes=2"]
    return [start(*common, f"--process-id={i}") for i in range(2)]


@pytest.mark.slow
def test_two_processes_call_as_often_as_each_other():
    """Each has a clock of its own, and one that called once more would wait for ever."""
    processes = start_two("--load=zipf")
    (out, err), (other_out, other_err) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err + other_err
    assert out.count(" zipf ") == 3
    assert "zipf" not in other_out


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_with_an_error():
    """At once where a connection breaks; else after jax's 100 s without a heartbeat, or the command's own time-out."""
    first, second = start_two("--load=balanced,zipf,text", "--repeats=1000")
    try:
        for line in first.stderr:
            if "dense, load" in line:
                break
        second.kill()
        err = first.communicate(timeout=150)[1]
        assert first.returncode != 0
        assert re.search("Task 1|task: 1|task_id=1|not done after|Connection closed", err), err[-2000:]
    finally:
        first.kill()
        second.communicate()


@pytest.mark.slow
def test_an_exchange_that_is_too_slow_ends_the_command():
    process = start("--load=balanced", "--timeout=0.001")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last == "error: load balanced, ep 4, 4 tokens: making the load: not done after 0.001 s, given up"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ep", "1"], "an exchange needs two devices at least, got --ep 1; --ep 8 makes virtual ones on a CPU"),
        (["--ep", "7"], "num_experts=256 is not divisible by ep=7; choose ep among 1, 2, 4"),
        (["--ep", "0"], "--ep: must be a whole number of at least 1, got '0'"),
        (["--tokens", "0"], "--tokens: must be a whole number of at least 1, got '0'"),
        (["--load", "balanced,even"], "--load must be some of balanced, zipf, text, got 'even'"),
        (["--transport", "post"], "--transport must be some of dense, ragged, remote, got 'post'"),
        (["--model", "gpt-5"], "unknown model 'gpt-5'; expected one of deepseek-v3"),
        (["--precision", "w4a4"], "precision must be 'w16a16' or 'w8a8', got 'w4a4'"),
        (["--timeout", "0"], "--timeout: must be a positive number, got '0'"),
        (["--repeats", "1"], "--repeats: must be a whole number of at least 2, got '1'"),
        (["--hidden", "100"], "hidden_size=100"),
        ([*TINY, "--reduce", "3"], "hidden_size=128 is not divisible by the reduction 3"),
        ([*TINY, "--tokens", "100000000"], "100000000 tokens on each of 4 virtual devices need about"),
        ([*TINY, "--load", "text", "--text", "/nowhere"], "--text /nowhere: cannot be read: No such file or directory"),
    ],
)
@pytest.mark.usefixtures("virtual")
def test_bad_arguments_are_one_clear_line(args, message, capsys):
    assert run(main, args) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert err[-1].startswith("error: ")
    assert "Traceback" not in err

import os
import subprocess

import jax

from bench.record import provenance


def test_commit_says_when_the_tree_is_changed(monkeypatch):
    answers = {"ls-files": "provenance.py", "rev-parse": "abc1234", "status": " M bench/gpu.py"}
    monkeypatch.setattr(provenance, "_output", lambda *command: answers[command[3]])
    assert provenance.current_commit() == "abc1234+dirty"
    answers["status"] = ""
    assert provenance.current_commit() == "abc1234"
    answers["ls-files"] = ""  # in no checkout, or in that of another project
    assert provenance.current_commit() == "unknown"


def test_the_commit_is_that_of_the_code_wherever_it_is_called(monkeypatch, tmp_path):
    here = provenance.current_commit()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    assert provenance.current_commit() == here


def test_the_head_of_a_record(monkeypatch):
    monkeypatch.setattr(provenance, "_output", lambda *command: "580.1" if command[0] == "nvidia-smi" else "")
    head = provenance.provenance("bench.x", ["--a", "b c"], "NVIDIA H200", ("jax", "no-such-package"), None)
    assert set(head) == {"command", "chip", "driver", "versions", "commit", "date"}
    assert head["command"] == "python -m bench.x --a 'b c'"
    assert (head["driver"], head["commit"]) == ("580.1", "unknown")
    assert head["versions"]["jax"]
    assert head["versions"]["no-such-package"] is None


def test_a_cpu_is_called_by_architecture_and_cores():
    if jax.default_backend() != "cpu":
        assert provenance.chip_name() == jax.devices()[0].device_kind
    else:
        assert provenance.chip_name().endswith(f"CPU, {os.cpu_count()} cores")

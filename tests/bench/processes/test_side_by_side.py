"""Processes side by side end when the one that started them does, however it ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from bench.processes.side_by_side import device_environment

PARENT = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
from bench.command.parser import run
from bench.processes.side_by_side import my_share, run_side_by_side
folder = pathlib.Path(sys.argv[1])
def main(argv):
    if (share := my_share()) is not None:
        (folder / str(share.process)).write_text("here")
        time.sleep(60)
    else:
        run_side_by_side("child", argv, 2, folder)
sys.exit(run(main))
"""


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGKILL"])
@pytest.mark.quick("SIGTERM", "SIGINT")
def test_they_end_with_the_process_that_started_them(how, tmp_path):
    (tmp_path / "child.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{pathlib.Path.cwd()}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "child", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as parent:
        assert wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        found = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        children = [int(pid) for pid in found.split()]
        assert len(children) == 2
        parent.send_signal(getattr(signal, how))
        _, err = parent.communicate(timeout=30)
    assert wait_until(lambda: not any(map(is_running, children)))
    if how == "SIGINT":
        assert (parent.returncode, err) == (130, "interrupted\n")


def test_processes_are_dealt_to_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in device_environment(0, 1)
    assert device_environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [device_environment(each, 2)["CUDA_VISIBLE_DEVICES"] for each in (0, 1)] == ["5", "7"]

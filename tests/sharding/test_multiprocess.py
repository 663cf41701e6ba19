"""The layer over chips of two processes, which talk through gloo: what a pod slice of several hosts does."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NUM_PROCESSES = 2
SECONDS = 240


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.slow
def test_two_processes_of_four_chips(tmp_path):
    address = f"localhost:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    logs = [tmp_path / f"process{i}.txt" for i in range(NUM_PROCESSES)]
    workers = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.sharding.multiprocess_worker", address, str(NUM_PROCESSES), str(i)]
            with log.open("w") as out:
                workers.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + SECONDS
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            if any(worker.poll() for worker in workers):
                break  # the others would wait for it
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    said = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
    assert [worker.returncode for worker in workers] == [0] * NUM_PROCESSES, said
    assert said.count("right") == 6 * NUM_PROCESSES, said

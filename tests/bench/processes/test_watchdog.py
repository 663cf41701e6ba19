"""A step that does not end, in Python and inside a call of jax."""

import subprocess
import sys
import threading
import time

import pytest

from bench.processes.watchdog import Watchdog

HANGS = """
import time
import jax
from bench.processes.watchdog import Watchdog

wait = jax.jit(lambda x: jax.pure_callback(lambda x: time.sleep(60) or x, x, x))
with Watchdog(1).watching("remote, load text, ep 8, 16 tokens", "send"):
    jax.block_until_ready(wait(1.0))
"""


def test_a_step_that_takes_too_long_is_named(capsys):
    ended = threading.Event()
    status = []
    watchdog = Watchdog(0.01, end=lambda code: (status.append(code), ended.set()))
    with watchdog.watching("dense, load zipf, ep 4, 1 tokens: give_back"):
        assert ended.wait(10)
    assert status == [1]
    expected = "error: dense, load zipf, ep 4, 1 tokens: give_back: not done after 0.01 s, given up"
    assert capsys.readouterr().err.strip() == expected


def test_a_step_that_ends_is_left_alone_and_so_is_what_follows(capsys):
    status = []
    watchdog = Watchdog(0.05, end=status.append)
    for _ in range(3):
        with watchdog.watching("send"):
            pass
    with pytest.raises(KeyError), watchdog.watching("send"):
        raise KeyError
    time.sleep(0.1)
    assert (status, capsys.readouterr().err) == ([], "")


def test_a_call_of_jax_that_hangs_ends_the_process():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == "error: remote, load text, ep 8, 16 tokens: send: not done after 1 s, given up"
    )
    assert time.monotonic() - begin < 50

"""Ctrl-C ends a command with one line and status 130, and what a command started ends when the command does."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130
"""The exit status that shells give a command which Ctrl-C ended."""

_PARENT = "MOEJAX_BENCH_PARENT"
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def _end_at_once(*_: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def quiet_while_importing() -> None:
    """Ctrl-C ends the process at once and without a traceback, for as long as modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored: `nohup`, `&`
        signal.signal(signal.SIGINT, _end_at_once)


def raise_at_interrupts() -> bool:
    """Makes Ctrl-C raise KeyboardInterrupt, so that cleanup runs; returns whether this process is a bench command.

    If it is not, its host (pytest, say) decides what Ctrl-C does.
    """
    is_command = signal.getsignal(signal.SIGINT) is _end_at_once
    if is_command:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return is_command


def child_environment() -> dict[str, str]:
    """The environment for a process that calls `end_with_parent`."""
    return {**os.environ, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Has this process killed when the one that gave it `child_environment` ends, even by SIGKILL; on Linux only."""
    if sys.platform != "linux" or (parent := os.environ.get(_PARENT)) is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was gone before
        os._exit(1)

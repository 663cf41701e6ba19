"""One command in several processes: each does its share, prepares beside the others and measures alone on its device.

Who may measure is what `bench.processes.turns` settles, for each device by itself.

Tracing and lowering are Python, of which a process runs one thread at a time; compiling takes all CPU cores there are.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from bench.processes.file_lock import HAS_LOCKS
from bench.processes.interrupts import child_environment
from bench.processes.turns import Turns

_TURNS = ".turns"
_SHARE = "MOEJAX_BENCH_SHARE"
_DEVICE = "MOEJAX_BENCH_DEVICE"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of one process.

    Attributes:
      process: its number, from 0.
      processes: how many there are.
    """

    process: int
    processes: int

    def of[Item](self, items: Sequence[Item]) -> Sequence[Item]:
        """What falls to the process, to which items are dealt in turn."""
        return items[self.process :: self.processes]


def my_share() -> Share | None:
    """The share that `run_side_by_side` gave this process; None for one that was started otherwise."""
    share = os.environ.get(_SHARE)
    return None if share is None else Share(*map(int, share.split("/")))


def my_turns(folder: pathlib.Path) -> Turns:
    """Turns with those that `run_side_by_side` started for the folder and the same device, if this is one of them."""
    return Turns(folder / _TURNS / os.environ[_DEVICE] if my_share() else None)


def prepare_jobs(jobs: int) -> None:
    """What a command does before it uses jax, so that `run_side_by_side` can start so many processes.

    Raises:
      ValueError: there are several, and files have no locks here.
    """
    if jobs > 1:
        if not HAS_LOCKS:
            raise ValueError(f"--jobs must be 1 on this system, whose files have no locks for processes; got {jobs}")
        # Each process, this one too, would reserve most of the accelerator's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run_side_by_side(module: str, argv: Sequence[str], jobs: int, folder: pathlib.Path, devices: int = 1) -> list[int]:
    """Runs `python -m {module} {argv}` in `jobs` processes that write to `folder`; their exit statuses.

    What they print of their results is left to whoever reads the records. Of several GPUs each process sees one, to
    which processes are dealt in turn.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            env={**child_environment(), _SHARE: f"{number}/{jobs}", **device_environment(number % devices, devices)},
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process alone, which says so once and ends the others
        )
        for number in range(jobs)
    ]
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder / _TURNS, ignore_errors=True)


def device_environment(number: int, devices: int) -> dict[str, str]:
    """What tells a process its device, of the GPUs that this process sees."""
    if devices == 1:
        return {_DEVICE: "0"}
    visible = os.environ.get(_VISIBLE, ",".join(map(str, range(devices)))).split(",")
    return {_DEVICE: str(number), _VISIBLE: visible[number]}

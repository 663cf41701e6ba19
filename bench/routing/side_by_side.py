"""A sweep in several processes, which prepare their cases side by side and measure alone (`bench.routing.turns`)."""

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from bench.routing.cases import Case

LOCK = ".turns"
"""The file in the folder of records that they lock; it is there as long as they run."""


def share_of(cases: Sequence[Case], share: str) -> list[Case]:
    """The cases of process i of n, for "i/n"; those that run the same programs stay together.

    Raises:
      ValueError: `share` is not of that form.
    """
    number, of, count = share.partition("/")
    if not (of and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--share must be I/N with I below N, got {share!r}")
    together = [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.programs_key)]
    return list(itertools.chain.from_iterable(together[int(number) :: int(count)]))


def run_side_by_side(module: str, argv: Sequence[str], jobs: int, folder: pathlib.Path) -> list[int]:
    """Runs `python -m {module} {argv} --share I/N` in `jobs` processes that write to `folder`; their exit statuses.

    What they print of their results is left to whoever reads the records.
    """
    # Each would reserve most of the memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *argv, "--share", f"{number}/{jobs}"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for number in range(jobs)
    ]
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
        (folder / LOCK).unlink(missing_ok=True)

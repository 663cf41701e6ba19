"""How far a long job is, and how long the rest will take: one line on standard error, in plain text.

On a terminal the line is written over; elsewhere each step has its own.

    [ 37 %, 2 min 10 s left] 8,48,7168,2048 fp8
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from bench.measure.clock import Stopwatch


class Progress:
    """The line, and the time since it began.

    Args:
      total: steps of the job.
      stream: where to write, standard error if None.
      clock: gives seconds.
    """

    def __init__(self, total: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._watch = Stopwatch(clock)

    @property
    def seconds(self) -> float:
        """Seconds elapsed since it was made."""
        return self._watch.seconds

    def show(self, done: int, doing: str, at_most: float = float("inf")) -> None:
        """Says that `done` steps are done and what is being done.

        Args:
          done: steps.
          doing: a few words.
          at_most: the job ends after so many seconds even if it is not done.
        """
        left = "?" if done == 0 else _duration(min(self.seconds / done * (self._total - done), at_most - self.seconds))
        share = 100 * done // max(1, self._total)
        self._write(f"[{share:3d} %, {left} left] {doing}", end="" if self._stream.isatty() else "\n")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._write(line, end="\n")

    def _write(self, line: str, end: str) -> None:
        print("\r\x1b[K" * self._stream.isatty() + line, end=end, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

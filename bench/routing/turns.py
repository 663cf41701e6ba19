"""Processes that prepare their work side by side and use the accelerator in turn.

Tracing and lowering a case takes Python longer than measuring it takes the accelerator, but what is measured wants to
be alone there. So each process takes its turn for a whole case, and gives it away while it lowers.
"""

import contextlib
import pathlib
from collections.abc import Iterator


class Turns:
    """A process's place among those that share an accelerator.

    Args:
      path: a file that all of them lock; None for a process that has the accelerator to itself.
    """

    def __init__(self, path: pathlib.Path | None = None):
        self._path = path
        self._descriptor: int | None = None

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Waits until no other process has its turn, and has it until the end."""
        if self._path is None:
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            self._descriptor = file.fileno()
            self._lock(True)
            try:
                yield
            finally:
                self._descriptor = None

    @contextlib.contextmanager
    def give(self) -> Iterator[None]:
        """Leaves the turn, if this process has it, to the others until the end."""
        self._lock(False)
        try:
            yield
        finally:
            self._lock(True)

    def _lock(self, exclusively: bool) -> None:
        if self._descriptor is not None:
            import fcntl  # which Windows lacks

            fcntl.flock(self._descriptor, fcntl.LOCK_EX if exclusively else fcntl.LOCK_UN)

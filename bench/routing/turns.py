"""Processes that prepare their work side by side and measure one at a time.

Tracing, lowering and compiling a case takes far longer than measuring it, but what is measured wants to be alone on the
accelerator. So a process is there beside the others while it makes inputs and compiles, leaves while it lowers, and has
it to itself while it measures.
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
    def beside(self) -> Iterator[None]:
        """Uses the accelerator beside other processes until the end; waits for one that is alone there."""
        if self._path is None:
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            self._descriptor = file.fileno()
            self._lock("LOCK_SH")
            try:
                yield
            finally:
                self._descriptor = None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While beside others: waits until all of them have left, and has the accelerator to itself until the end."""
        with self._changed_to("LOCK_EX"):
            yield

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """While beside others: does not use the accelerator until the end."""
        with self._changed_to("LOCK_UN"):
            yield

    @contextlib.contextmanager
    def _changed_to(self, operation: str) -> Iterator[None]:
        self._lock(operation)
        try:
            yield
        finally:
            self._lock("LOCK_SH")

    def _lock(self, operation: str) -> None:
        if self._descriptor is not None:
            import fcntl  # which Windows lacks

            fcntl.flock(self._descriptor, getattr(fcntl, operation))

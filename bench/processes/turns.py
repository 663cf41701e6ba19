"""Processes that prepare their work side by side and measure one at a time.

Tracing, lowering and compiling a case takes far longer than measuring it, but what is measured wants to be alone on the
accelerator. So a process is there beside the others while it makes inputs and compiles, leaves while it lowers, and has
it to itself while it measures.
"""

import contextlib
import os
import pathlib
import weakref
from collections.abc import Iterator
from typing import Literal

from bench.processes.file_lock import lock

_How = Literal["alone", "shared", "free"]


class Turns:
    """A process's place among those that share an accelerator; at first it does not use it.

    Args:
      folder: where the files are that all of them lock; None for a process that has the accelerator to itself.
    """

    def __init__(self, folder: pathlib.Path | None = None):
        self._how: _How = "free"
        self._files: tuple[int, int] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = self._open(folder / "room"), self._open(folder / "door")

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Uses the accelerator beside other processes until the end; waits for one that is alone there."""
        return self._being("shared")

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Has the accelerator to itself until the end; waits until all others have left, the earliest to wait first."""
        return self._being("alone")

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Does not use the accelerator until the end."""
        return self._being("free")

    @contextlib.contextmanager
    def _being(self, how: _How) -> Iterator[None]:
        before = self._how
        self._become(how)
        try:
            yield
        finally:
            self._become(before)

    def _open(self, path: pathlib.Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _become(self, how: _How) -> None:
        self._how = how
        if self._files is None:
            return
        room, door = self._files
        if how == "alone":
            lock(room, "free")
            lock(door, "alone")  # behind which whoever has just been alone waits
            lock(room, "alone")
            lock(door, "free")
        else:
            lock(room, how)

"""Locks on files among processes, as POSIX systems have them."""

import importlib.util
from typing import Literal

HAS_LOCKS = importlib.util.find_spec("fcntl") is not None
"""Windows has none."""


def lock(descriptor: int, how: Literal["alone", "shared", "free"], *, wait: bool = True) -> bool:
    """Locks an open file, exclusively or shared, or unlocks it; returns whether it did.

    Closing the file unlocks it too, as does the end of the process. Without `HAS_LOCKS` nothing happens.

    Args:
      descriptor: of the file.
      how: 'alone', 'shared' or 'free'.
      wait: whether to wait for other processes that hold it.
    """
    if HAS_LOCKS:
        import fcntl

        mode = {"alone": fcntl.LOCK_EX, "shared": fcntl.LOCK_SH, "free": fcntl.LOCK_UN}[how]
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True

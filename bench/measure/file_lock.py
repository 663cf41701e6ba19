"""Locks on files among processes, as POSIX systems have them."""

import importlib.util
from typing import Literal

HAS_LOCKS = importlib.util.find_spec("fcntl") is not None
"""Windows has none."""


def lock(descriptor: int, how: Literal["alone", "shared", "free"], *, wait: bool = True) -> bool:
    """Locks an open file so, by this process alone or together with others, or unlocks it; whether it is done.

    Closing the file unlocks it too, as does the end of the process. Without `HAS_LOCKS` nothing happens.

    Args:
      descriptor: of the file.
      how: it is to be locked.
      wait: until other processes allow it; otherwise it is not done where they do not.
    """
    if HAS_LOCKS:
        import fcntl

        mode = {"alone": fcntl.LOCK_EX, "shared": fcntl.LOCK_SH, "free": fcntl.LOCK_UN}[how]
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True

"""Locks on files among processes, as POSIX systems have them."""

import importlib.util
from typing import Literal

HAS_LOCKS = importlib.util.find_spec("fcntl") is not None
"""Windows has none."""


def lock(descriptor: int, how: Literal["alone", "shared", "free"]) -> None:
    """Waits until an open file is locked so, by this process alone or together with others, or unlocks it.

    Closing the file unlocks it too, as does the end of the process. Without `HAS_LOCKS` nothing happens.
    """
    if HAS_LOCKS:
        import fcntl

        fcntl.flock(descriptor, {"alone": fcntl.LOCK_EX, "shared": fcntl.LOCK_SH, "free": fcntl.LOCK_UN}[how])

"""An end for what may never end: a collective that waits for a chip which is not coming, say.

watchdog = Watchdog(300)
with watchdog.watching("remote, load text, ep 8, 128 tokens", "send"):
    jax.block_until_ready(send(x))

Waiting for a device cannot be interrupted from Python, and so no exception could end it: another thread ends the
process. Whoever has results to keep writes them before.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

_FAILED = 1
"""The exit status of a command whose result is missing."""


class Watchdog:
    """Ends the process when a step takes too long.

    Args:
      seconds: that a step may take.
      end: is called with the exit status; it must not raise.
    """

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit):
        self._seconds = seconds
        self._end = end

    @contextlib.contextmanager
    def watching(self, *what: str) -> Iterator[None]:
        """Gives what is done inside its time; `what` it is, from the whole to the step, is what the error says."""
        timer = threading.Timer(self._seconds, self._give_up, (": ".join(what),))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, what: str) -> None:
        # In one write, as other threads may be writing too; a terminal may have a line of progress.
        print(f"\nerror: {what}: not done after {self._seconds:g} s, given up", file=sys.stderr, flush=True)
        self._end(_FAILED)

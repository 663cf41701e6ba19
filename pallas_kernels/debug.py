"""Checks of values that are known only when a program runs, for looking for a fault; off unless asked for.

    def loss(params, batch): ...

    with debug_checks():
        error, out = jax.jit(checkify.checkify(loss))(params, batch)  # from jax.experimental import checkify
    error.throw()  # JaxRuntimeError: group_sizes[3] = -1 …

They are `checkify.check`s: a function that is traced inside of `debug_checks()` has to be functionalised by
`checkify.checkify` before it is jitted, or jax says so. Called as it is, without jit, it raises at once.
"""

import contextlib
from collections.abc import Iterator

from pallas_kernels.tracing.override import Override

_checking = Override[bool]("debug_checks")


@contextlib.contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Makes operators that are traced inside of it check the values of their arguments when the program runs.

    Args:
      enabled: False turns the checks off again in a part.
    """
    with _checking(enabled):
        yield


def are_checked() -> bool:
    """Whether operators are to check values when they run."""
    return bool(_checking.get())

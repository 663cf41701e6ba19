"""Values that a `with` statement gives to whatever runs inside of it, however deep."""

import contextlib
import contextvars
from collections.abc import Iterator


class Override[Value]:
    """Nothing, except inside of a `with`.

        forced = Override[Config]("forced")
        with forced(config):
            forced.get()  # config
        forced.get()  # None

    Caches of traced functions do not know of it: trace a jitted function anew for each value.
    """

    def __init__(self, name: str):
        self._value = contextvars.ContextVar[Value | None](name, default=None)

    @contextlib.contextmanager
    def __call__(self, value: Value) -> Iterator[None]:
        """Gives `value` to what runs in this context."""
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)

    def get(self) -> Value | None:
        """The value of the innermost `with`, or None."""
        return self._value.get()

"""Values that a `with` statement gives to whatever runs inside of it, however deep."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any


class Override[Value]:
    """Nothing, except inside of a `with`.

        forced = Override[Config]("forced")
        with forced(config):
            forced.get()  # config
        forced.get()  # None

    Caches of traced functions do not know of it: a jitted function must be traced again for each value. The operators
    themselves do, as each keeps the values with which it was called (`overrides`).
    """

    def __init__(self, name: str):
        self._value = contextvars.ContextVar[Value | None](name, default=None)
        _ALL.append(self)

    @contextlib.contextmanager
    def __call__(self, value: Value | None) -> Iterator[None]:
        """Gives `value` to what runs in this context."""
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)

    def get(self) -> Value | None:
        """The value of the innermost `with`, or None."""
        return self._value.get()


_ALL: list[Override[Any]] = []


@dataclasses.dataclass(frozen=True)
class Overrides:
    """All values that were given at one moment, to be given again later.

    Attributes:
      values: those that are not None, each with its override.
    """

    values: tuple[tuple[Override[Any], Any], ...]

    def __hash__(self) -> int:
        return hash(tuple(override for override, _ in self.values))  # values need not be hashable

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Gives these values, and no others, to what runs in this context."""
        kept = dict(self.values)
        with contextlib.ExitStack() as stack:
            for override in _ALL:
                if override.get() is not kept.get(override):
                    stack.enter_context(override(kept.get(override)))
            yield


def overrides() -> Overrides:
    """All values that are given here and now."""
    return Overrides(tuple((override, value) for override in _ALL if (value := override.get()) is not None))

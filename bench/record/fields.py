"""What a value from a JSON file must look like, and the line that says where it does not.

    check({"step": 3, "loss": "x"}, {"step": int, "loss": (float, None)}, "train.jsonl, line 7")
    # ValueError: train.jsonl, line 7: loss must be a number or null, got 'x'

A field that nobody reads may be anything.
"""

import dataclasses
import reprlib
import types
import typing
from typing import Any

Expected = Any
"""One of

    int, float, str, bool   a value of that kind; a whole number is a float too
    (float, None)           such a value, or null
    [float]                 a list of such values
    {"a", "b"}              one of these texts
    {"step": int}           an object with these fields, and perhaps others
    {str: float}            an object with any fields, each such a value
    a dataclass             an object with its fields and no others
    a function              an object, of which the function says what is expected
"""

_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def check(value: Any, expected: Expected, place: str, name: str = "") -> None:
    """Raises ValueError unless a value is as expected.

    Args:
      value: as `json` gives it.
      expected: what it must look like.
      place: the file, and the line in it.
      name: of the value in there; "" for the whole.
    """
    can_be_null = isinstance(expected, tuple)
    if can_be_null:
        if value is None:
            return
        expected = expected[0]
    if not _is_kind(value, expected):
        wanted = _in_words(expected) + " or null" * can_be_null
        raise ValueError(f"{place}: {name or 'it'} must be {wanted}, got {reprlib.repr(value)}")
    if isinstance(expected, types.FunctionType):
        return check(value, expected(value), place, name)
    for part, wanted in _parts(value, expected, place, name):
        check(value[part], wanted, place, f"{name}[{part}]" if isinstance(part, int) else _join(name, part))


def _parts(value: Any, expected: Expected, place: str, name: str) -> list[tuple[Any, Expected]]:
    """The places in a list or an object, each with what is expected there."""
    if isinstance(expected, list):
        return [(number, expected[0]) for number in range(len(value))]
    if not _is_object(expected):
        return []
    if dataclasses.is_dataclass(expected):
        expected = typing.get_type_hints(expected)
        if unknown := [field for field in value if field not in expected]:
            raise ValueError(f"{place}: {_join(name, unknown[0])} is unknown; known are {', '.join(expected)}")
    if str in expected:
        return [(field, expected[str]) for field in value]
    if missing := [field for field in expected if field not in value]:
        raise ValueError(f"{place}: {_join(name, missing[0])} is missing")
    return list(expected.items())


def _is_object(expected: Expected) -> bool:
    return isinstance(expected, dict | types.FunctionType) or dataclasses.is_dataclass(expected)


def _in_words(expected: Expected) -> str:
    if isinstance(expected, set):
        return f"one of {', '.join(sorted(expected))}"
    return "an object" if _is_object(expected) else "a list" if isinstance(expected, list) else _NAMES[expected]


def _is_kind(value: Any, expected: Expected) -> bool:
    if isinstance(expected, set):
        return isinstance(value, str) and value in expected
    if _is_object(expected):
        return isinstance(value, dict)
    if isinstance(expected, list):
        return isinstance(value, list)
    kinds = (int, float) if expected is float else expected
    return isinstance(value, kinds) and (expected is bool or not isinstance(value, bool))


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field

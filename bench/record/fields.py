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
    or_null = ""
    if isinstance(expected, tuple):
        if value is None:
            return
        expected, or_null = expected[0], " or null"

    def require(is_right: bool, wanted: str) -> None:
        if not is_right:
            raise ValueError(f"{place}: {name or 'it'} must be {wanted}{or_null}, got {reprlib.repr(value)}")

    if isinstance(expected, set):
        require(isinstance(value, str) and value in expected, f"one of {', '.join(sorted(expected))}")
    elif isinstance(expected, list):
        require(isinstance(value, list), "a list")
        for number, item in enumerate(value):
            check(item, expected[0], place, f"{name}[{number}]")
    elif isinstance(expected, types.FunctionType):
        require(isinstance(value, dict), "an object")
        check(value, expected(value), place, name)
    elif isinstance(expected, dict) or dataclasses.is_dataclass(expected):
        require(isinstance(value, dict), "an object")
        for field, wanted in _fields(value, expected, place, name).items():
            check(value[field], wanted, place, _join(name, field))
    else:
        kinds = (int, float) if expected is float else expected
        # Python counts true and false among the whole numbers.
        require(isinstance(value, kinds) and isinstance(value, bool) == (expected is bool), _NAMES[expected])


def _fields(value: dict[str, Any], expected: Expected, place: str, name: str) -> dict[str, Expected]:
    """What is expected of each field of an object."""
    if dataclasses.is_dataclass(expected):
        expected = typing.get_type_hints(expected)
        if unknown := [field for field in value if field not in expected]:
            raise ValueError(f"{place}: {_join(name, unknown[0])} is unknown; known are {', '.join(expected)}")
    if str in expected:
        return dict.fromkeys(value, expected[str])
    if missing := [field for field in expected if field not in value]:
        raise ValueError(f"{place}: {_join(name, missing[0])} is missing")
    return expected


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field

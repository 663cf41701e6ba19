"""The `type`s of options: each says what it expects, and argparse adds which option it was and what came.

    error: argument --reduce: must be a whole number of at least 1, got '0' (python -m bench.decode --help lists ...)

A file or folder that cannot be written is refused here too, before any work is done for it.
"""

import argparse
import math
import os
import pathlib
import tempfile
from collections.abc import Callable

_LARGEST = 2**63 - 1
"""The largest size accepted: XLA counts in int64."""


def whole_number(least: int, most: int = _LARGEST) -> Callable[[str], int]:
    """A whole number within bounds."""

    def value(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            bound = f"at most {most}" if number > most else f"at least {least}"
            raise argparse.ArgumentTypeError(f"must be a whole number of {bound}, got {text!r}")
        return number

    return value


positive_int = whole_number(1)
natural_int = whole_number(0)
seed_number = whole_number(0, 2**31 - 1)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, lambda number: number > 0, "a positive number")


def natural_float(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, lambda number: number >= 0, "a number of at least 0")


def _number(text: str, is_right: Callable[[float], bool], what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and is_right(number)):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return number


def several[Value](parse: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Values between commas."""

    def values(text: str) -> list[Value]:
        return [parse(part.strip()) for part in text.split(",")]

    return values


NAMES = several(str)
POSITIVE_INTS = several(positive_int)
POSITIVE_FLOATS = several(positive_float)


def output_file(text: str) -> str:
    """A file that can be written, or - for standard output."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file, got ''")
    path = pathlib.Path(text)
    if text == "-" or (path.exists() and not path.is_dir() and os.access(path, os.W_OK)):
        return text
    if path.exists():
        reason = "it is a folder" if path.is_dir() else "it is read-only"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not _can_make_files(path.parent):
        reason = f"the folder {path.parent} is read-only"
    else:
        return text
    raise argparse.ArgumentTypeError(f"cannot write {text}: {reason}; give a file that can be written")


def _can_make_files(folder: pathlib.Path) -> bool:
    """Asked by trying, since rights say nothing of file systems that are read-only."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def output_folder(text: str) -> pathlib.Path:
    """A folder that can be written, or made."""
    folder = pathlib.Path(text)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if there.is_dir() and _can_make_files(there):
        return folder
    reason = f"{there} is read-only" if there.is_dir() else f"{there} is no folder"
    raise argparse.ArgumentTypeError(f"cannot write to {text}: {reason}; give a folder that can be written")

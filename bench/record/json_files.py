"""JSON files, and files of records, one JSON object a line, of which an interruption costs at most the last line.

What is read is checked against what is expected of it (`bench.record.fields`), and an error names file and line.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from bench.processes.file_lock import lock
from bench.record.fields import Expected, check
from bench.record.files import read_text, write_whole


def read_json(path: pathlib.Path, expected: Expected) -> Any:
    """The value in a file.

    Raises:
      ValueError: the file is no JSON, or holds something else than is expected.
      OSError: it cannot be read.
    """
    value = _parsed(read_text(path), str(path))
    check(value, expected, str(path))
    return value


def read_records(path: pathlib.Path, expected: Expected) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file, each behind its place, "FILE, line N"; none if it does not exist.

    A last line that was cut off while it was written is left out.

    Args:
      path: the file.
      expected: what a record must hold.

    Raises:
      ValueError: another line is no such record.
    """
    lines = read_text(path).split("\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):
        place = f"{path}, line {number}"
        record = _parsed(line, place)
        check(record, expected, place)
        yield place, record


def append_records(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes records to the end of a file, one process at a time; a line that was cut off there is taken away first.

    Raises:
      ValueError: a record holds NaN or an infinity, which JSON cannot say.
    """
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        lock(file.fileno(), "alone")
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())  # at the end, wherever was read


def write_json(data: Any, path: str) -> None:
    """Write `data` as JSON to the file `path`, or to standard output when it is "-".

    Raises:
      OSError: the file cannot be written.
      ValueError: `data` holds a NaN or an infinity, which JSON has no way to say.
    """
    text = json.dumps(data, indent=2, allow_nan=False, default=_plain)
    if path == "-":
        print(text)
    else:
        write_whole(pathlib.Path(path), text + "\n")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_in_64_bits)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON: {error}; mend it, or move the file away") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _in_64_bits(text: str) -> int:
    return int(text) if len(text) < 20 and abs(int(text)) < 2**63 else _refuse(text[:20])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")

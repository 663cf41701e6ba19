"""JSON files, and files of records, one JSON object a line, of which an interruption costs at most the last line."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.measure.file_lock import lock


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file; none if it does not exist. A last line that was cut off while it was written is left out.

    Raises:
      ValueError: another line is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is no record: {error}; move the file away to start anew"
            ) from None
        records.append(record)
    return records


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
        return
    try:
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; give a writable file, or - for standard output") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")

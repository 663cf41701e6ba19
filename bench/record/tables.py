"""What people read (aligned plain text) and what programs read (JSON)."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.model.roofline import LayerTime

Cell = str | int | float | None


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """An aligned table of plain text, without a trailing newline.

    Columns whose cells are all numbers (or None, shown as "-") are aligned to the right; floats get three decimals,
    integers thousands separators.

    Raises:
      ValueError: a row has more or fewer cells than there are headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(
                f"each row must have {len(headers)} cells, one for each of {list(headers)}; got {list(row)}"
            )
    texts = [[cell_text(cell) for cell in row] for row in rows]
    columns = range(len(headers))
    widths = [max(len(line[i]) for line in [headers, *texts]) for i in columns]
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[i].rjust(widths[i]) if numeric[i] else cells[i].ljust(widths[i]) for i in columns]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, texts)])


def layer_table(layer: LayerTime) -> str:
    """One line an operator with its modelled times in µs and traffic in MB, and their sums."""
    headers = ["operator", "G,M,K,N", "comp µs", "dma µs", "link µs", "elapsed µs", "traffic MB", "urate %"]
    rows: list[list[Cell]] = []
    for op in layer.operators:
        shape = ",".join(map(str, dataclasses.astuple(op.shape))) if op.shape else ""
        utilisation = op.urate * 100 if op.shape else None
        times = [op.comp_elapsed, op.dma_elapsed, op.link_elapsed, op.elapsed]
        rows.append([op.name, shape, *times, op.dram_traffic / 1e6, utilisation])
    sums = [sum(float(row[i] or 0) for row in rows) for i in range(2, 7)]
    return format_table(headers, [*rows, ["total", "", *sums, None]])


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
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; give a writable file, or - for standard output") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def cell_text(cell: Cell) -> str:
    """A cell as tables show it."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,.3f}" if isinstance(cell, float) else f"{cell:,}"

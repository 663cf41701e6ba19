"""Tables for people, of plain text or in Markdown."""

from collections.abc import Sequence

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


def cell_text(cell: Cell) -> str:
    """A cell as tables show it."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,.3f}" if isinstance(cell, float) else f"{cell:,}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in Markdown, without a trailing newline."""
    lines: list[Sequence[Cell]] = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

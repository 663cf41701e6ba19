"""The record of `bench.cycles` as tables: for the terminal, and for docs/results.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.model.shapes import shape_text
from bench.record.tables import Cell, format_table, markdown_table
from bench.tpu.cycles_cases import ACTIVATION, FUSED, GUESSED, INSTRUCTIONS, MEGABLOX, OURS, TOKAMAX, WAITS

Row = Mapping[str, Any]


def cycles_of(row: Row, kind: str, *names: str) -> int | None:
    """The fewest cycles of some implementations in a row, None where none of them has a figure."""
    found = [figure["cycles"] for name in names for figure in _figures(row, kind, name) if "cycles" in figure]
    return min(found, default=None)


def over_tokamax(row: Row, kind: str, least: int = 0) -> float | None:
    """Our cycles over those of tokamax's best, both at least `least`."""
    ours, theirs = cycles_of(row, kind, OURS), cycles_of(row, kind, *TOKAMAX)
    return None if ours is None or theirs is None else max(ours, least) / max(theirs, least)


def over_unfused(row: Row, name: str = FUSED) -> float | None:
    """The fused kernel's cycles over those of the product and of XLA's activation after it.

    With OURS for `name` it is the product's own: what a fused kernel takes whose activation takes no time.
    """
    fused, product, activation = (cycles_of(row, WAITS, each) for each in (name, OURS, ACTIVATION))
    return None if fused is None or product is None or activation is None else fused / (product + activation)


def table(rows: Sequence[Row]) -> str:
    """One line a case, TPU and kind, all figures."""
    names = (OURS, MEGABLOX, *TOKAMAX)
    headers = ["chip", "case", "G,M,K,N", "figures", "floor", *names, "ours/tokamax", "fused/unfused"]
    lines: list[list[Cell]] = []
    for row in rows:
        for kind, floor in ((WAITS, "floor_cycles"), (INSTRUCTIONS, "arithmetic_cycles")):
            ratios = over_tokamax(row, kind), over_unfused(row) if kind == WAITS else None
            texts = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            figures = [_shown(row, kind, name) for name in names]
            lines.append([row["chip"], row["case"], shape_text(row["shape"]), kind, row[floor], *figures, *texts])
    return format_table(headers, lines)


def block(record: Mapping[str, Any], link: str) -> str:
    """The Markdown for docs/results.md: where the figures come from, a line a case, a column a TPU, and a summary."""
    rows = record["rows"]
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items() if version)
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    about = (
        f"`python -m bench.cycles`, {versions}, commit {commits}, {record['date'][:10]}: static estimates of "
        f"the compiler, in thousands of cycles of a core, for products in BF16 of G groups of M rows, K → N. "
        f"{record['note']} In a cell: ours / tokamax's best (v1 or v2) / megablox, floor; then instructions alone, "
        f"ours / tokamax's best; and for gate/up the fused kernel over the product and XLA's activation after it. "
        f"All figures, tiles and reasons: [{Path(link).name}]({link})."
    )
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    lines: list[list[Cell]] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["chip"]: row for row in rows if row["case"] == case}
        shape = shape_text(next(iter(of_case.values()))["shape"])
        lines.append([case, shape, *(_readers_cell(of_case.get(chip)) for chip in chips)])
    return "\n\n".join([about, markdown_table(["case", "G,M,K,N", *chips], lines), summary(rows)])


def summary(rows: Sequence[Row]) -> str:
    """What the figures come to, in a few sentences."""
    over = {
        "Whole kernels": [over_tokamax(row, WAITS) for row in rows],
        "With the floor for what lies below it": [over_tokamax(row, WAITS, row["floor_cycles"]) for row in rows],
        "Instructions alone": [over_tokamax(row, INSTRUCTIONS) for row in rows],
    }
    texts = [
        f"{name}: ours takes no more than tokamax's best in {sum(x <= 1 for x in known)} of {len(known)} cells, "
        f"{min(known):.2f}× to {max(known):.2f}×."
        for name, ratios in over.items()
        if (known := _known(ratios))
    ]
    if fused := _known([over_unfused(row) for row in rows]):
        texts.append(
            f"The fused kernel takes {min(fused):.2f}× to {max(fused):.2f}× of the unfused, at most 0.9× in "
            f"{sum(x <= 0.9 for x in fused)} of {len(fused)} cells."
        )
    if hidden := _known([over_unfused(row, OURS) for row in rows]):
        texts.append(
            f"An activation that took no time at all would make that {min(hidden):.2f}× to {max(hidden):.2f}×, at most "
            f"0.9× in {sum(x <= 0.9 for x in hidden)}."
        )
    return " ".join(texts)


def _known(ratios: Sequence[float | None]) -> list[float]:
    return [ratio for ratio in ratios if ratio is not None]


def _readers_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    peers = ((OURS,), TOKAMAX, (MEGABLOX,))
    whole = [_shown(row, WAITS, *names, unit=1000) for names in peers]
    parts = [f"{' / '.join(whole)}, floor {row['floor_cycles'] / 1000:,.0f}"]
    if row[INSTRUCTIONS]:
        parts.append(" / ".join(_shown(row, INSTRUCTIONS, *names, unit=1000) for names in peers[:2]))
    if (fused := over_unfused(row)) is not None:
        parts.append(f"fused {fused:.2f}×")
    return "; ".join(parts)


def _shown(row: Row, kind: str, *names: str, unit: int = 1) -> str:
    """The fewest cycles of some implementations in a unit, or why there are none."""
    if (cycles := cycles_of(row, kind, *names)) is not None:
        return f"{cycles / unit:,.0f}"
    figures = [figure for name in names for figure in _figures(row, kind, name)]
    return f"no: {figures[0]['reason'][:50]}" if figures else "-"


def _figures(row: Row, kind: str, name: str) -> Sequence[Mapping[str, Any]]:
    """What a row has of an implementation.

    Where the instructions alone come to less than the arithmetic, the compiler has not followed the kernel's loops. It
    then has not with the copies either, but their waits hide that.
    """
    guesses = [figure for figure in row[INSTRUCTIONS].get(name, []) if figure.get("reason") == GUESSED]
    return guesses or row[kind].get(name, [])

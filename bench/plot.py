"""Pictures of what the other commands recorded, in one HTML file.

The folder holds train.jsonl, sweep.jsonl, layer.jsonl, permute.jsonl and comm.jsonl of the commands that are called so,
layers*.json of `bench.gpu`, or some of them. A figure whose data is missing is left out, and the report says why.
"""

import html
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.command.parser import make_parser, run
from bench.command.values import output_folder
from bench.exchange import records as exchange_records
from bench.figures import exchange, one_chip, timeline, training
from bench.figures.section import Section, require_matplotlib, standalone
from bench.one_chip.records import read_lines
from bench.record.files import write_whole
from bench.record.tables import Cell, cell_text
from bench.training.records import FILE_NAME, Run, read_runs

REPORT = "report.html"
_ONE_CHIP_FILES = ("sweep.jsonl", "layer.jsonl", "permute.jsonl")

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15191f; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
p, summary { color: var(--soft); max-width: 50rem; }
svg { height: auto; max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem; text-align: left; }
td.number { text-align: right; }
"""


def main(argv: Sequence[str]) -> None:
    """Writes the report."""
    parser = make_parser(
        "bench.plot",
        f"Makes one self-contained page, {REPORT} in the folder, of the records in it: time and bandwidth against "
        "experts and k, the layer's split, quality against speed, held-out curves, the experts' load over training, "
        "what moving tokens between chips costs, and when each kernel of a layer runs.",
        ("results", "docs/results/h200 --svg docs/results/h200"),
    )
    parser.add_argument("results", type=pathlib.Path, help="the folder with the files of the benches")
    parser.add_argument(
        "--svg", type=output_folder, metavar="DIR", help="write each figure to DIR as well, as NAME.svg"
    )
    args = parser.parse_args(argv)
    path, sections = write_report(args.results)
    print(f"wrote {path}")
    if args.svg is not None:
        args.svg.mkdir(parents=True, exist_ok=True)
        for section in sections:
            if section.svg is not None:
                path = args.svg / f"{section.name}.svg"
                write_whole(path, standalone(section.svg))
                print(f"wrote {path}")


def write_report(folder: pathlib.Path) -> tuple[pathlib.Path, list[Section]]:
    """Draws what the records in a folder allow, into its report.html; returns its path and what it shows.

    Raises:
      ValueError: there is no such folder, matplotlib is not installed, there are no records, or a file is not theirs.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    require_matplotlib()
    runs = read_runs(folder / FILE_NAME)
    records = [record for name in _ONE_CHIP_FILES for record in read_lines(folder / name)]
    moved = exchange_records.read_lines(folder / exchange_records.FILE_NAME)
    layers = timeline.read(folder)
    lines = timeline.sections(layers)
    if not runs and not records and not moved and not lines:
        files = FILE_NAME, *_ONE_CHIP_FILES, exchange_records.FILE_NAME, timeline.FILES
        raise ValueError(
            f"{folder} has none of {', '.join(files)} with records in it; make some with "
            f"python -m bench.train --quick --out {folder}"
        )
    others = [*training.sections(runs), *one_chip.sections(records)] if runs or records else []
    sections = [*others, *exchange.sections(moved), *lines]
    write_whole(folder / REPORT, _page(sections, _origins(runs, [*records, *moved], layers.values())))
    return folder / REPORT, sections


def say_report(folder: pathlib.Path) -> None:
    """What a bench does at its end: makes the report if it can, and says on standard error where it is or why not."""
    try:
        print(f"wrote {write_report(folder)[0]}", file=sys.stderr)
    except (ValueError, OSError) as reason:
        print(f"no {folder / REPORT}: {reason}", file=sys.stderr)


def _origins(
    runs: Mapping[str, Run], records: Sequence[Mapping[str, Any]], layers: Iterable[Mapping[str, Any]]
) -> list[list[Cell]]:
    """What was run where, each once."""
    dated = [*(run.head for run in runs.values()), *layers]
    heads = [(head, head["date"]) for head in dated] + [(record, record["time"]) for record in records]
    rows: dict[tuple[str, str, str], list[Cell]] = {}
    for head, time in heads:
        versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
        rows[head["command"], head["chip"], head["commit"]] = [
            head["command"], head["chip"], head["commit"], versions, time[:10],
        ]  # fmt: skip
    return list(rows.values())


def _page(sections: Sequence[Section], origins: Sequence[Sequence[Cell]]) -> str:
    body = [f"<h1>Routing benches</h1>\n{_table(('command', 'chip', 'commit', 'versions', 'date'), origins)}"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>\n<p>{html.escape(section.text)}</p>")
        if section.svg is not None:
            body.append(f'<div class="wide">{section.svg}</div>')
        if section.rows:
            body.append(f"<details><summary>The figures</summary>{_table(section.headers, section.rows)}</details>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Routing benches</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    lines = ["".join(_cell(cell) for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _cell(cell: Cell) -> str:
    kind = "" if isinstance(cell, str) else ' class="number"'
    return f"<td{kind}>{html.escape(cell_text(cell))}</td>"


if __name__ == "__main__":
    sys.exit(run(main))

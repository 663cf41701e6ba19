"""Shows the record of bench.gpu or bench.cycles as a table in docs/results.md, and as a plot.

What bench.gpu measured is plotted; what bench.cycles compiled has a section of its own.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.command.parser import make_parser, run
from bench.command.values import output_file
from bench.figures.section import INK, drawing, standalone, svg_of
from bench.hopper.table import ceilings_line, measured_peers, table
from bench.record.fields import Expected
from bench.record.files import read_text, write_whole
from bench.record.json_files import read_json
from bench.tpu.cycles_cases import KINDS
from bench.tpu.cycles_table import block as cycles_block

HEADING = "## Speed on an H200"
BEGIN, END = "<!-- h200:begin -->", "<!-- h200:end -->"
CYCLES_HEADING = "## Cycles on TPUs, as compiled"
CYCLES_MARKS = "<!-- tpu-cycles:begin -->", "<!-- tpu-cycles:end -->"
_LICENSE = re.compile(r"^#+ licen[cs]e\b", re.IGNORECASE | re.MULTILINE)
_SHAPE = dict.fromkeys("GMKN", int)
_VERSIONS = {str: (str, None)}


def _either(field: str, there: Expected, otherwise: Expected) -> Expected:
    """An object that looks like `there` if it has the field."""
    return lambda value: there if field in value else otherwise


_CYCLES: Expected = {
    **{"versions": _VERSIONS, "date": str, "note": str},
    "rows": [
        {
            **{"chip": str, "case": str, "commit": str, "shape": _SHAPE, "floor_cycles": int},
            **{kind: {str: [_either("cycles", {"cycles": int}, {"reason": str})]} for kind in KINDS},
        }
    ],
}
_CASE: Expected = {
    **{"note": str, **_SHAPE, "goal": {"unit": str}, "us": float, "measured_floor_us": float},
    **{"share_of_measured_floor": float, "tflops": float, "tb_per_s": float},
    "peers": {str: _either("error", {"error": str}, {"us": float, "ratio": (float, None)})},
}
_GPU: Expected = {
    **{"chip": str, "driver": str, "commit": str, "date": str, "versions": _VERSIONS},
    "ceilings": {"read_bandwidth": float, "bf16_flops": float, "fp8_flops": (float, None)},
    "cases": {str: _either("error", {"error": str}, _CASE)},
}
"""What is shown of the records."""

_BAR = 0.8  # of the height of a case, shared by its implementations


def main(argv: Sequence[str]) -> None:
    """Reads the record, draws the plot beside it, and writes its block of the page."""
    parser = make_parser(
        "bench.publish",
        "Puts the table of a run of bench.gpu into a page, between its two marks, and plots it beside the record; or "
        "the table of a run of bench.cycles.",
        (
            "docs/results/h200.json",
            "docs/results/h200.json --page README.md",
            "docs/results/tpu_cycles.json",
        ),
    )
    parser.add_argument("record", help="the JSON file of bench.gpu or bench.cycles")
    parser.add_argument(
        "--page",
        "--readme",
        type=output_file,
        default="docs/results.md",
        help="the Markdown file to change (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    path, page = Path(args.record), Path(args.page)
    record = read_json(path, lambda record: _CYCLES if "rows" in record else _GPU)
    text = read_text(page)
    base = page.resolve().parent
    if "rows" in record:
        content = cycles_block(record, os.path.relpath(path.resolve(), base))
        text = replace_block(text, content, CYCLES_HEADING, CYCLES_MARKS)
    else:
        svg = path.with_suffix(".svg")
        if importlib.util.find_spec("matplotlib"):
            plot(record, svg)
            print(f"wrote {svg}")
        else:
            print(f"{svg} is left as it is: matplotlib is not installed (pip install -e '.[plots]')", file=sys.stderr)
        links = [os.path.relpath(file.resolve(), base) for file in (path, svg) if file.exists()]
        text = replace_block(text, block(record, *links))
    write_whole(page, text)
    print(f"wrote {page}")


def block(record: Mapping[str, Any], record_link: str, plot_link: str | None = None) -> str:
    """The Markdown that stands between the marks: where the figures come from, the table, the plot."""
    versions = [f"{package} {version}" for package, version in record["versions"].items() if version]
    about = (
        f"`make bench-gpu`, {record['chip']}, driver {record['driver']}, {', '.join(versions)}, commit "
        f"{record['commit']}, {record['date'][:10]}: device time of the kernels in µs, weights out of cache, G groups "
        f"of M rows, K → N. In brackets how much longer a peer takes; the floor is that of what this chip reached in "
        f"the run ({ceilings_line(record)}). All figures: [{Path(record_link).name}]({record_link})."
    )
    parts = [about, table(record, markdown=True)]
    if plot_link is not None:
        parts.append(f"![Time of each implementation over the floor]({plot_link})")
    return "\n\n".join(parts)


def replace_block(text: str, content: str, heading: str = HEADING, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with `content` between the marks; where they are missing, under a new heading before the licence's.

    Raises:
      ValueError: one mark is there without the other, twice, or in the wrong order.
    """
    first, last = marks
    marked = f"{first}\n{content}\n{last}"
    if first not in text and last not in text:
        found = _LICENSE.search(text)
        before, after = (text[: found.start()], "\n" + text[found.start() :]) if found else (text, "")
        return f"{before.rstrip()}\n\n{heading}\n\n{marked}\n{after}"
    begin, end = text.find(first), text.find(last)
    if text.count(first) != 1 or text.count(last) != 1 or begin > end:
        raise ValueError(f"expected {first} once and {last} once after it, or neither; mend the file or remove both")
    return text[:begin] + marked + text[end + len(last) :]


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Bars of each implementation's time over the floor of the run, a group for each case; needs matplotlib."""
    cases = {name: case for name, case in record["cases"].items() if "us" in case}
    names = ["ours", *dict.fromkeys(peer for case in cases.values() for peer in measured_peers(case))]
    with drawing("h200") as pyplot:
        from matplotlib import ticker

        colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.8 * len(cases)))
        for row, case in enumerate(cases.values()):
            times = {"ours": case["us"], **{peer: case["peers"][peer]["us"] for peer in measured_peers(case)}}
            height = _BAR / len(times)
            for place, (name, microseconds) in enumerate(times.items()):
                y, ratio = row - _BAR / 2 + (place + 0.5) * height, microseconds / case["measured_floor_us"]
                axes.barh(y, ratio, height, color=colours[name])
                axes.text(ratio, y, f" {microseconds:,.0f} µs", va="center", fontsize=7)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(cases)), cases)
        axes.invert_yaxis()
        axes.set_xlabel(f"device time over the floor of the run, {record['chip']} (less is better)")
        axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names], names, fontsize=8)
        write_whole(path, standalone(svg_of(figure)))


if __name__ == "__main__":
    sys.exit(run(main))

"""Figures of `bench.gpu`: which kernel of a layer runs when, a bar for each layer, a figure for each record."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures.section import INK, Section, drawing, svg_of
from bench.measure.timeline import Launch
from bench.record.fields import Expected
from bench.record.json_files import read_json
from bench.record.tables import Cell

FILES = "layers*.json"
"""Records of `bench.gpu`, in the folder of the others."""

_OURS = "_mosaic_gpu_kernel"
_OTHERS = "XLA's"
_GREYS = 14, 15  # of the colours
_LEAST_SHARE = 0.004  # of the time of a layer: what takes less is no line of the table

Record = Mapping[str, Any]


def read(folder: pathlib.Path) -> dict[str, Record]:
    """The records of the files in a folder that `bench.gpu --json` wrote, by what follows "layers" in their names.

    Raises:
      ValueError: one holds something else.
    """
    expected = {"chip": str, "commit": str, "cases": {str: _case}}
    return {path.stem.removeprefix("layers"): read_json(path, expected) for path in sorted(folder.glob(FILES))}


def _case(case: Mapping[str, Any]) -> Expected:
    """What is expected of a case: one that failed has no time line."""
    return {"timeline": [Launch]} if "timeline" in case else {}


def sections(records: Mapping[str, Record]) -> list[Section]:
    """A figure of each record; none where no time line was recorded."""
    return [section for suffix, record in records.items() for section in _of_record(suffix, record)]


def _of_record(suffix: str, record: Record) -> list[Section]:
    lines = {name: case["timeline"] for name, case in record["cases"].items() if case.get("timeline")}
    if not lines:
        return []
    names = sorted({_short(launch["name"]) for line in lines.values() for launch in line} - {_OTHERS})
    with drawing(figure_name := f"timelines{suffix}") as pyplot:
        size = 9, 0.6 + 1.1 * len(lines)
        figure, grid = pyplot.subplots(len(lines), 1, figsize=size, squeeze=False, layout="constrained")
        of_names = [colour for i, colour in enumerate(pyplot.get_cmap("tab20").colors) if i not in _GREYS]
        colours = {name: of_names[i % len(of_names)] for i, name in enumerate(names)} | {_OTHERS: "#888888"}
        for axes, (name, line) in zip(grid.flat, lines.items(), strict=True):
            _draw(axes, line, colours)
            axes.set_title(f"{name}: {_end(line):.1f} µs", fontsize=9, loc="left")
        grid.flat[-1].set_xlabel("µs")
        patches = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        figure.legend(patches, list(colours), fontsize=7, loc="outside right upper")
        svg = svg_of(figure)
    rows: list[list[Cell]] = [
        [name, launch["name"].removesuffix(_OURS), launch["begin_us"], launch["end_us"] - launch["begin_us"]]
        for name, line in lines.items()
        for launch in line
        if launch["end_us"] - launch["begin_us"] >= _LEAST_SHARE * _end(line)
    ]
    text = (
        f"{record['chip']}, commit {record['commit']}. The kernels of the last layer of a chain, or of a training "
        "step, by jax's profiler, under which there are gaps that are not there without it."
    )
    headers = "case", "kernel", "begins at µs", "µs"
    return [Section(figure_name, f"The kernels of a layer, {record['commit']}", text, svg, headers, rows)]


def _draw(axes: Any, line: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]) -> None:
    for launch in line:
        width = launch["end_us"] - launch["begin_us"]
        axes.broken_barh([(launch["begin_us"], width)], (0, 1), color=colours[_short(launch["name"])], ec=INK, lw=0.3)
    axes.set(xlim=(0, _end(line)), ylim=(0, 1), yticks=[])


def _end(line: Sequence[Mapping[str, Any]]) -> float:
    return max(launch["end_us"] for launch in line)


def _short(name: str) -> str:
    """The name of a kernel of ours; one for all others."""
    return name.removesuffix(_OURS) if name.endswith(_OURS) else _OTHERS

"""Figures of the benches of one chip: time and bandwidth against experts and k, and the layer split into its stages."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.figures.section import Section, drawing, svg_of
from bench.one_chip.cases import LOADS
from bench.one_chip.layouts import LAYOUTS
from bench.record.tables import Cell

_MAX_PANELS, _MAX_BARS = 6, 27
_COLUMNS = 3
_PANEL = ("tokens", "hidden", "intermediate", "dtype", "load", "capacity_factor", "batch", "length", "seed", "chip")
_STAGES = ("router", "plan", "dispatch", "gate_up", "down", "combine")
_SPLIT = "The layer, split into its stages"
_FILES = "the records of bench.sweep, bench.permute and bench.layer have"

Record = Mapping[str, Any]


def sections(records: Sequence[Record]) -> list[Section]:
    """The figures, each with its reason where it cannot be drawn. `bench.one_chip.records` lists a record's fields."""
    sound = [record for record in records if record["error"] is None]
    wanted = (
        ("latency", "Time of the layer", "layer", _TIME),
        ("permute", "Time of pack and combine", "permute", _TIME),
        ("bandwidth", "Bandwidth of pack and combine", "permute", _BANDWIDTH),
    )
    return [*(_against_experts(sound, *each) for each in wanted), _split(sound)]


_TIME = {"mean_us": "-"}
_BANDWIDTH = {"bw_32k": "-", "bw_strict": "--"}
"""Fields of a record, and how their lines are drawn."""


def _against_experts(
    records: Sequence[Record], name: str, what: str, operator: str, values: Mapping[str, str]
) -> Section:
    """A panel for each size, a line for each k and value, over the number of experts."""
    title = f"{what} against experts and k"
    of_kind = [r for r in records if r["operator"] == operator and r[next(iter(values))] is not None]
    panels: dict[tuple[Any, ...], dict[tuple[int, int], Record]] = {}
    for record in sorted(_plainest(of_kind), key=_place):  # of equal cases the last one counts
        panels.setdefault(tuple(record[field] for field in _PANEL), {})[record["k"], record["experts"]] = record
    several = {key: points for key, points in panels.items() if len({experts for _, experts in points}) > 1}
    balanced = {key: points for key, points in several.items() if key[_PANEL.index("load")] == "balanced"}
    wanted = balanced or several
    if not wanted:
        return Section(name, title, f"Left out: {_FILES} no {operator} with two numbers of experts at one size.")
    shown = dict(list(wanted.items())[:_MAX_PANELS])
    headers = *_SIZES, *values
    with drawing(name) as pyplot:
        columns = min(_COLUMNS, len(shown))
        lines = -(-len(shown) // columns)
        figure, grid = pyplot.subplots(
            lines, columns, figsize=(1 + 3.6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
        )
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, points in zip(grid.flat, shown.values(), strict=False):
            _panel(axes, points, values, pyplot.get_cmap("viridis"))
            axes.set_title(_size(next(iter(points.values()))), fontsize=9)
        svg = svg_of(figure)
    drawn = [record for points in shown.values() for _, record in sorted(points.items())]
    same = ", ".join(
        f"{field} {' and '.join(sorted({str(record[field]) for record in drawn}))}"
        for field in ("chip", "dtype", "load", "layout", "backend", "clock")
    )
    text = f"{same[0].upper()}{same[1:]}. Bars are 95 % confidence intervals of the mean."
    if values is _BANDWIDTH:
        text += " bw_32k counts 2·K·H elements a token, bw_strict 2·(K+1)·H."
    if len(several) > len(shown):
        text += f" {len(several) - len(shown)} further sizes and loads are in the records and not drawn."
    return Section(name, title, text, svg, headers, [[record[field] for field in headers] for record in drawn])


_SIZES = ("tokens", "hidden", "experts", "k")


def _panel(axes: Any, points: Mapping[tuple[int, int], Record], values: Mapping[str, str], colours: Any) -> None:
    ks = sorted({k for k, _ in points})
    for place, k in enumerate(ks):
        line = [record for (of_k, _), record in sorted(points.items()) if of_k == k]
        for field, style in values.items():
            heights = np.array([record[field] for record in line])
            is_time = field == "mean_us"
            axes.errorbar(
                [record["experts"] for record in line],
                heights,
                yerr=abs(np.transpose([record["ci95_us"] for record in line]) - heights) if is_time else None,
                fmt=f"o{style}",
                color=colours(0.15 + 0.7 * place / max(1, len(ks) - 1)),
                markersize=3,
                capsize=3,
                label=f"k {k}" if is_time else f"k {k} {field}",
            )
    axes.set_xscale("log", base=2)
    ticks = sorted({experts for _, experts in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel("experts")
    axes.set_ylabel("µs" if values is _TIME else "GB/s")
    axes.legend(fontsize=7, loc="upper center", ncols=2)


def _place(record: Record) -> tuple[Any, ...]:
    """Where a case stands among others: by size; the loads of a size, then its layouts, beside one another."""
    sizes = (record[name] for name in ("tokens", "hidden", "experts", "k", "capacity_factor"))
    layouts = list(LAYOUTS)
    layout = layouts.index(record["layout"]) if record["layout"] in layouts else -1
    return (record["batch"] is not None, *sizes, LOADS.index(record["load"]), layout)


def _plainest(records: Sequence[Record]) -> list[Record]:
    """Of the variants of a case the compact layout, or else the commonest, and our operators, or else plain XLA."""
    layouts = collections.Counter(record["layout"] for record in records)
    layout = "compact" if "compact" in layouts else next(iter(layouts.most_common(1)), (None, 0))[0]
    chosen = [record for record in records if record["layout"] == layout]
    ours = [record for record in chosen if record["backend"] != "xla"]
    return ours or chosen


def _size(record: Record) -> str:
    tokens = f"{record['tokens']}" if record["batch"] is None else f"{record['batch']} × {record['length']}"
    width = f", I {record['intermediate']}" if record["intermediate"] else ""
    return f"T {tokens}, H {record['hidden']}{width}, C {record['capacity_factor']:g}, {record['load']}"


def _split(records: Sequence[Record]) -> Section:
    bars: dict[str, Record] = {}
    split = [r for r in records if r["operator"] == "layer" and set(_STAGES) <= set(r.get("stages_us") or ())]
    layouts = collections.Counter((record["chip"], record["case"]) for record in split)
    # Cases that compare layouts first.
    for record in sorted(split, key=lambda r: (-layouts[r["chip"], r["case"]], _place(r))):
        bars[f"{record['chip']} {record['case']} {record['layout']} {record['backend']}"] = record
    if not bars:
        return Section("split", _SPLIT, f"Left out: {_FILES} no layer whose stages were timed.")
    shown = list(bars.values())[:_MAX_BARS]
    labels = [f"{_size(each)}, E {each['experts']}, K {each['k']}, {each['layout']}" for each in shown]
    with drawing("split") as pyplot:
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(shown)))
        colours = pyplot.get_cmap("tab10").colors
        left = np.zeros(len(shown))
        for stage, colour in zip(_STAGES, colours, strict=False):
            widths = [record["stages_us"][stage] for record in shown]
            axes.barh(range(len(shown)), widths, left=left, color=colour, label=stage)
            left += widths
        axes.set_yticks(range(len(shown)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("µs, each stage timed by itself")
        axes.legend(fontsize=8, ncols=len(_STAGES), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        svg = svg_of(figure)
    text = (
        f"{', '.join(sorted({record['chip'] for record in shown}))}. The sum of the stages is not the time of the "
        "layer, which is in the table too: run as one program, stages share launches and data."
    )
    if len(bars) > len(shown):
        text += f" {len(bars) - len(shown)} further cases are in the records and not drawn."
    headers = ("case", *_STAGES, "sum µs", "layer µs", "routing share")
    rows: list[list[Cell]] = []
    for label, record in zip(labels, shown, strict=True):
        stages = record["stages_us"]
        whole = sum(stages.values()), record["mean_us"], record["routing_share"]
        rows.append([label, *(stages[stage] for stage in _STAGES), *whole])
    return Section("split", _SPLIT, text, svg, headers, rows)

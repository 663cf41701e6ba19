"""Figure of `bench.comm`: time there and back against tokens of a chip, a line for each transport."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures.section import Section, drawing, svg_of
from bench.record.tables import Cell

_PANEL = ("ep", "load", "hidden", "experts", "k", "precision", "chip")
_MAX_PANELS, _COLUMNS = 6, 3

Record = Mapping[str, Any]


def sections(records: Sequence[Record]) -> list[Section]:
    """The figure; none where nothing was recorded. `bench.exchange.records` lists a record's fields."""
    panels: dict[tuple[Any, ...], dict[tuple[str, int], Record]] = {}
    for record in records:  # of equal ones the last counts
        if record["error"] is None:
            panels.setdefault(_panel_of(record), {})[record["movement"], record["tokens"]] = record
    if not panels:
        return []
    shown = dict(list(panels.items())[:_MAX_PANELS])
    with drawing("exchange") as pyplot:
        columns = min(_COLUMNS, len(shown))
        lines = -(-len(shown) // columns)
        size = 1 + 3.6 * columns, 3.2 * lines
        figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, points in zip(grid.flat, shown.values(), strict=False):
            _draw(axes, points)
        svg = svg_of(figure)
    rows: list[list[Cell]] = []
    for points in shown.values():
        for _, record in sorted(points.items()):
            both = record["together"]
            what = [record[name] for name in (*_PANEL[:2], "tokens", "movement")]
            times = [record[step]["median_us"] for step in ("send", "give_back", "together")]
            rows.append([*what, *times, both["gb_per_s"], both["link_share"]])
    chips = sorted({record["chip"] for points in shown.values() for record in points.values()})
    text = (
        f"{', '.join(chips)}. Wall time of plan, send, give back and combine, without experts; of bare collectives, of "
        "there and back."
    )
    if len(panels) > len(shown):
        text += f" {len(panels) - len(shown)} further loads and sizes are in the records and not drawn."
    headers = "ep", "load", "tokens", "moved by", "send µs", "back µs", "both µs", "GB/s", "link share"
    return [Section("exchange", "Moving tokens between chips", text, svg, headers, rows)]


def _panel_of(record: Record) -> tuple[Any, ...]:
    return tuple(record[field] for field in _PANEL)


def _draw(axes: Any, points: Mapping[tuple[str, int], Record]) -> None:
    for name in dict.fromkeys(movement for movement, _ in points):
        line = [record for (movement, _), record in sorted(points.items()) if movement == name]
        times = [record["together"]["median_us"] for record in line]
        style = "o--" if name.startswith("lax.") else "o-"
        axes.plot([record["tokens"] for record in line], times, style, markersize=3, label=name)
    record = next(iter(points.values()))
    axes.set_title(
        f"ep {record['ep']}, {record['load']}, H {record['hidden']}, E {record['experts']}, K {record['k']}", fontsize=9
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens of a chip", ylabel="µs")
    axes.legend(fontsize=7)

"""Records of `bench.comm`: one JSON object for each movement of each case, a line each in `comm.jsonl`.

movement         a transport, or "lax.all_to_all" or "lax.ragged_all_to_all" (`bench.exchange.movements`)
ep, tokens       chips, and tokens on each of them
load             "balanced", "zipf" or "text" (`bench.one_chip.loads`)
hidden, experts, k, precision, reduction   the layer; `hidden` is what was moved, `reduction` what divided it
is_virtual       whether the chips are slices of a CPU
chain            calls in one program
repeats          measurements of each step
send, give_back, together   null where it failed, or an object for each:
    median_us, min_us, spread_us   of a call by the wall clock; the spread is the greatest less the least
    needed_bytes   of rows for other chips, over all chips
    busiest_bytes  of them what one chip sends or receives, at the most
    wire_bytes     what really goes to other chips, over all chips; null where that is not known
    gb_per_s       busiest_bytes by the median
    link_share     gb_per_s over what the links of a device carry; null where that is not known
layer_us, one_chip_us, exposed_us   the whole layer, that of one chip by itself, and the difference, see
    `bench.exchange.whole_layer`; null where not asked for or failed; the last two also where a chip has
    fewer experts than K
error            null, or why there are no figures
time, command, chip, driver, versions, commit
"""

import pathlib
from typing import Any

from bench.exchange.measure import STEPS, Moved
from bench.one_chip.cases import LOADS
from bench.record.fields import Expected
from bench.record.json_files import read_records
from bench.record.tables import Cell, format_table
from pallas_kernels.chips import Chip

Record = dict[str, Any]

FILE_NAME = "comm.jsonl"

LAYER_FIELDS = ("layer_us", "one_chip_us", "exposed_us")

_OF_A_STEP: Expected = {"median_us": float, "needed_bytes": int, "gb_per_s": float, "link_share": (float, None)}
_OF_A_LINE: Expected = {
    **{"movement": str, "ep": int, "tokens": int, "load": set(LOADS), "hidden": int, "experts": int, "k": int},
    **{"precision": str, "error": (str, None), "time": str, "command": str, "chip": str, "commit": str},
    **{"versions": {str: (str, None)}, **{step: (_OF_A_STEP, None) for step in STEPS}},
}
"""What those who read the records look at."""


def read_lines(path: pathlib.Path) -> list[Record]:
    """The records of a file; none if there is no file.

    Raises:
      ValueError: a line is no such record.
    """
    return [record for _, record in read_records(path, _OF_A_LINE)]


def step_records(moved: Moved, chip: Chip | None) -> Record:
    """The objects of the three steps; rates are a share of the links of `chip`, None for one that is not known."""
    link = chip and chip.link_bandwidth and chip.link_bandwidth / chip.jax_devices
    traffic, record = moved.traffic, {}
    needed, busiest = _by_step(traffic.needed), _by_step(traffic.busiest)
    wire = dict.fromkeys(STEPS) if traffic.wire is None else _by_step(traffic.wire)
    for step, time in moved.times.items():
        rate = busiest[step] / (time.median_us * 1e-6)
        record[step] = {
            "median_us": time.median_us,
            "min_us": time.min_us,
            "spread_us": time.spread_us,
            "needed_bytes": needed[step],
            "busiest_bytes": busiest[step],
            "wire_bytes": wire[step],
            "gb_per_s": rate / 1e9,
            "link_share": rate / link if link else None,
        }
    return record


def _by_step(there_and_back: tuple[int, int]) -> dict[str, int]:
    return dict(zip(STEPS, (*there_and_back, sum(there_and_back)), strict=True))


def table(records: list[Record]) -> str:
    """Those that have figures, for people: times of the three steps, and bytes and rates of all together."""
    headers = ["ep", "tokens", "load", "moved by"]
    for name in ("send", "back", "both"):
        headers += [f"{name} µs", "spread"]
    headers += ["needed MB", "wire MB", "GB/s", "link %"]
    has_layer = any(record["layer_us"] is not None for record in records)
    rows: list[list[Cell]] = []
    for record in records:
        if record["error"] is not None:
            continue
        row: list[Cell] = [record[name] for name in ("ep", "tokens", "load", "movement")]
        for step in STEPS:
            row += [record[step]["median_us"], record[step]["spread_us"]]
        both = record["together"]
        wire, share = both["wire_bytes"], both["link_share"]
        row += [both["needed_bytes"] / 1e6, wire and wire / 1e6, both["gb_per_s"], share and 100 * share]
        layer, one = record["layer_us"], record["one_chip_us"]
        rows.append([*row, layer, one, layer and one and layer / one] if has_layer else row)
    return format_table([*headers, "layer µs", "one chip µs", "ratio"] if has_layer else headers, rows)

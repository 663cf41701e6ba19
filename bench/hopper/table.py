"""The record of `bench.gpu` as a table, plain or Markdown, and as a list of what went wrong."""

from collections.abc import Mapping
from typing import Any

from bench.model.shapes import shape_text
from bench.record.tables import Cell, format_table, markdown_table

Record = Mapping[str, Any]


def table(record: Record, markdown: bool = False) -> str:
    """One line a case: our time and rate, the share of this run's floor, the goal, each peer's time and its ratio.

    In Markdown, which is for readers of docs/results.md, goals and errors are left out and the peers share a column.
    """
    if not markdown:
        return format_table(*_cells(record))
    return markdown_table(*_cells_for_readers(record))


def failures(record: Record) -> list[str]:
    """A line for each case of ours that has no figures or misses its bar."""
    lines = []
    for name, case in record["cases"].items():
        goal = case["goal"]
        if "error" in case:
            lines.append(f"{name}: {case['error']}")
        elif case["met"] is False:
            value = case["us"] if goal["unit"] == "µs" else case["tflops"]
            lines.append(f"{name}: {value:.1f} {goal['unit']}, the bar is {_goal(goal, 'bar')}")
    return lines


def peer_problems(record: Record) -> list[str]:
    """A line for each peer and reason why it has no figures, with the cases that it concerns."""
    cases_of: dict[tuple[str, str], list[str]] = {}
    for name, case in record["cases"].items():
        for peer, outcome in case["peers"].items():
            if "error" in outcome:
                cases_of.setdefault((peer, outcome["error"]), []).append(name)
    return [f"{peer} ({', '.join(names)}): {reason}" for (peer, reason), names in cases_of.items()]


def ceilings_line(record: Record) -> str:
    """What the chip reached in this run."""
    ceilings = record["ceilings"]
    fp8 = ceilings["fp8_flops"]
    texts = [
        f"reads {ceilings['read_bandwidth'] / 1e12:.2f} TB/s",
        f"cuBLAS 8192³ BF16 {ceilings['bf16_flops'] / 1e12:.0f} TFLOP/s",
        *([] if fp8 is None else [f"FP8 {fp8 / 1e12:.0f} TFLOP/s"]),
    ]
    return ", ".join(texts)


def measured_peers(case: Record) -> list[str]:
    """The peers that have figures in one case of a record."""
    return [name for name, peer in case["peers"].items() if "us" in peer]


def time_text(outcome: Record) -> str:
    """The time in µs, and that of the device alone where the wall clock's is measured."""
    device_us = outcome.get("device_us")
    return f"{outcome['us']:.1f}" + ("" if device_us is None else f" (device {device_us:.1f})")


def _cells(record: Record) -> tuple[list[str], list[list[Cell]]]:
    cases = record["cases"]
    peers = list(dict.fromkeys(peer for case in cases.values() for peer in measured_peers(case)))
    headers = ["case", "G,M,K,N", "ours µs", "rate", "of floor", "bar", "aim", "met", *peers, "error"]
    rows: list[list[Cell]] = []
    for name, case in cases.items():
        label = f"{name} ({case['note']})" if case["note"] else name
        failed = "error" in case
        met = "no" if failed else {True: "yes", False: "no", None: "-"}[case["met"]]
        others = [_peer(case["peers"].get(peer)) for peer in peers]
        error = case["error"] if failed else f"{case['relative_error']:.1e}"
        goal = [_goal(case["goal"], which) for which in ("bar", "aim")]
        rows.append([label, *_ours(case), *goal, met, *others, error])
    return headers, rows


def _cells_for_readers(record: Record) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = []
    for name, case in record["cases"].items():
        if "error" not in case:
            peers = [f"{peer} {_peer(case['peers'][peer])}" for peer in measured_peers(case)]
            rows.append([f"{name}: {case['note']}" if case["note"] else name, *_ours(case), ", ".join(peers) or "-"])
    return ["case", "G,M,K,N", "µs", "rate", "of floor", "others, µs"], rows


def _ours(case: Record) -> list[Cell]:
    """Shape, time, rate and share of this run's floor."""
    if "error" in case:
        return [shape_text(case), "failed", "-", "-"]
    in_flops = case["goal"]["unit"] == "TFLOP/s"
    rate = f"{case['tflops']:.0f} TFLOP/s" if in_flops else f"{case['tb_per_s']:.2f} TB/s"
    return [shape_text(case), time_text(case), rate, f"{case['share_of_measured_floor']:.0%}"]


def _peer(peer: Record | None) -> str:
    if peer is None:
        return "-"
    if "error" in peer:
        return "failed"
    return f"{peer['us']:.1f}" + ("" if peer["ratio"] is None else f" ({peer['ratio']:.2f}×)")


def _goal(goal: Record, which: str) -> str:
    if (value := goal[which]) is None:
        return "-"
    return f"≤ {value:g} µs" if goal["unit"] == "µs" else f"≥ {value:g} TFLOP/s"

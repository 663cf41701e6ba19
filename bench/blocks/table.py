"""The record of `bench.decoder` as a table, and as a list of what went wrong."""

from collections.abc import Mapping
from typing import Any

from bench.blocks.measure import CONTENDERS, OURS
from bench.record.tables import Cell, format_table

Record = Mapping[str, Any]


def table(record: Record) -> str:
    """One line a case: our time and rates, and the time of each other contender with its multiple of ours."""
    headers = [
        "case",
        "shape",
        "ours µs",
        "tokens/s",
        "TFLOP/s",
        *(f"{name} µs (over ours)" for name in CONTENDERS[1:]),
    ]
    rows: list[list[Cell]] = []
    for name, case in record["cases"].items():
        if "error" in case:
            rows.append([name, case["shape"], "failed", *["-"] * (len(headers) - 3)])
            continue
        first, *others = (case["contenders"][contender] for contender in CONTENDERS)
        figures = ["failed", "-", "-"]
        if "us" in first:
            figures = [f"{first['us']:,.1f}", f"{first['tokens_per_s']:,.0f}", f"{first['tflops']:.3g}"]
        rows.append([name, case["shape"], *figures, *(_beside(other, first) for other in others)])
    return format_table(headers, rows)


def failures(record: Record) -> list[str]:
    """A line for each case without figures of ours."""
    lines = []
    for name, case in record["cases"].items():
        if "error" in case:
            lines.append(f"{name}: {case['error']}")
        else:
            of_ours = case["contenders"][OURS]
            lines += [f"{name}, {OURS}: {of_ours['error']}"] if "error" in of_ours else []
    return lines


def absences(record: Record) -> list[str]:
    """A line for each other contender and reason why it has no figures, with the cases that it concerns."""
    cases_of: dict[tuple[str, str], list[str]] = {}
    for name, case in record["cases"].items():
        for contender in CONTENDERS[1:]:
            outcome = case.get("contenders", {}).get(contender, {})
            if "error" in outcome:
                cases_of.setdefault((contender, outcome["error"]), []).append(name)
    return [f"{contender} ({', '.join(names)}): {reason}" for (contender, reason), names in cases_of.items()]


def _beside(outcome: Record, first: Record) -> str:
    if "us" not in outcome:
        return "-"
    return f"{outcome['us']:,.1f}" + (f" ({outcome['us'] / first['us']:.2f}×)" if "us" in first else "")

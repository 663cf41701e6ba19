"""Runs many cases into one file: skips those that it has, stops in time, survives a case that fails."""

import dataclasses
import gc
import pathlib
from collections.abc import Callable, Sequence

from bench.measure.errors import describe
from bench.measure.steps import StepTimer
from bench.one_chip.cases import Case
from bench.one_chip.records import Record, failure, lines_of, measured_cases, read_lines
from bench.record.json_files import append_records
from bench.record.progress import Progress

IDENTITY_TOLERANCE = 1e-3
"""Of packing and combining; a weighted sum in float32 whose weights sum to 1, rounded once, should be exact."""

AGREEMENT_TOLERANCE = 2e-2
"""Of layouts with one another: products of 16-bit operands that are added up, and rounded, in different orders."""

RunCase = Callable[[Case, StepTimer, int], list[Record]]


@dataclasses.dataclass
class Outcome:
    """What came of the cases.

    Attributes:
      records: lines of all cases that were asked for, those that the file already had as well.
      failures: a sentence for each case that failed or gave a wrong result.
      num_left: cases that there was no time for.
    """

    records: list[Record] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    num_left: int = 0


def run_cases(
    cases: Sequence[Case],
    run_case: RunCase,
    clock: StepTimer,
    origin: Record,
    *,
    path: pathlib.Path | None,
    repeats: int,
    progress: Progress,
    minutes: float = float("inf"),
) -> Outcome:
    """Runs the cases in order, those that failed before last.

    The records of a case are written to the file at `path` as soon as it is done. No case is begun that would likely
    end later than `minutes` after the beginning.
    """
    outcome = Outcome()
    old = [] if path is None else read_lines(path)
    have = measured_cases(old, origin["chip"])
    wanted = {case.key for case in cases}
    outcome.records += [r for r in old if r["case"] in wanted & have and r["error"] is None]
    # What failed before comes last, as it may take the process with it.
    failed = {r["case"] for r in old if r["error"] is not None}
    todo = sorted((case for case in cases if case.key not in have), key=lambda case: case.key in failed)
    if len(todo) < len(cases):
        progress.say(f"{len(cases) - len(todo)} of {len(cases)} cases are in {path} already")
    longest = 0.0
    for number, case in enumerate(todo):
        begin = progress.seconds
        if begin + longest > minutes * 60:
            outcome.num_left = len(todo) - number
            break
        progress.show(number, case.title, at_most=minutes * 60)
        with clock.turns.beside():
            try:
                lines = lines_of(run_case(case, clock, repeats), origin)
            except Exception as error:  # inputs that do not fit into memory, say; the other cases still count
                clock.forget()
                gc.collect()
                lines = [failure(case, origin, describe(error))]
        if path is not None:
            append_records(path, lines)
        outcome.records += lines
        outcome.failures += problems(lines)
        longest = max(longest, progress.seconds - begin)
    return outcome


def problems(lines: Sequence[Record]) -> list[str]:
    """A sentence for each record that reports a fault."""
    found = []
    for line in lines:
        if line["error"] is not None:
            found.append(f"{line['case']}: {line['error']}")
            continue
        for name, limit in (("identity_error", IDENTITY_TOLERANCE), ("agreement_error", AGREEMENT_TOLERANCE)):
            if line[name] is not None and not line[name] <= limit:
                what = f"{line['operator']}/{line['layout']}/{line['backend']}"
                found.append(f"{line['case']}: {what}: {name} {line[name]:.1e}, limit {limit:.0e}")
    return found

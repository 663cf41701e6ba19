"""Measures a case: each implementation is checked against the right answer first, and timed if it is right."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from bench.hopper.ceilings import Ceilings
from bench.hopper.goals import Case
from bench.hopper.peers import Implementation, from_torch
from bench.measure.clock import CallTime, copies_of, kernel_times, rotated, torch_times, wall_times
from bench.measure.errors import check, describe, relative_error
from pallas_kernels.chips import Chip

_GOALS_CHIP = "h200"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One implementation of a case.

    Attributes:
      time: device time of one call.
      relative_error: ‖result − right answer‖ / ‖right answer‖, the largest over results and copies of the inputs.
      configuration: the name of the function that was the fastest.
    """

    time: CallTime
    relative_error: float
    configuration: str = ""

    def record(self) -> dict[str, Any]:
        """Its JSON object."""
        return {
            "us": self.time.median_us,
            "min_us": self.time.min_us,
            "spread_us": self.time.spread_us,
            "relative_error": self.relative_error,
            "configuration": self.configuration,
            "kernels": list(self.time.kernels),
        }


Outcome = Measurement | str
"""What came of an implementation; a string is the reason why nothing did."""


def measure_case(case: Case, *, repeats: int, with_peers: bool) -> tuple[Outcome, dict[str, Outcome]]:
    """Ours, and each peer by name, on the same inputs."""
    problem = case.build(case)
    inputs = copies_of(problem.inputs) if case.clock == "kernels" else [problem.inputs]
    checked = problem.inputs if problem.checked is None else problem.checked
    reference = jax.block_until_ready(jax.jit(problem.reference)(*checked))
    measured = functools.partial(
        attempt, case, inputs=inputs, reference=reference, repeats=repeats, checked=problem.checked
    )
    ours = measured(problem.ours)
    return ours, {peer.name: measured(peer) for peer in (problem.peers if with_peers else ())}


def attempt(
    case: Case,
    implementation: Implementation,
    inputs: Sequence[Any],
    reference: Any,
    repeats: int,
    checked: tuple[Any, ...] | None = None,
) -> Outcome:
    """Measures `implementation`; whatever it raises becomes the reason, as one case must not end the others."""
    if (reason := implementation.why_not()) is not None:
        return reason
    outcomes: list[Measurement] = []
    reasons: list[str] = []
    try:
        args = [implementation.prepare(*one) for one in inputs]
    except Exception as error:
        return describe(error)
    timed = _by_wall if case.clock == "wall" else _in_torch if implementation.framework == "torch" else _by_kernels
    for name, function in implementation.functions.items():
        try:
            time, error_ = timed(case, function, args, checked or args[0], reference, repeats)
            outcomes.append(Measurement(time, error_, name))
        except Exception as error:
            reasons.append(describe(error))
    return min(outcomes, key=lambda outcome: outcome.time.median_us) if outcomes else reasons[0]


Args = Sequence[Any]
Function = Callable[..., Any]
Timed = tuple[CallTime, float]
"""The time of a call, and the error of its result, which is checked first."""


def _by_wall(case: Case, function: Function, args: Args, checked: Args, reference: Any, repeats: int) -> Timed:
    whole = jax.jit(function)
    check(error := relative_error(whole(*checked), reference), case.tolerance)
    return wall_times(whole, *args[0], repeats=repeats, calls=case.calls), error


def _in_torch(case: Case, function: Function, args: Args, checked: Args, reference: Any, repeats: int) -> Timed:
    check(error := _largest(relative_error(from_torch(function(*one)), reference) for one in args), case.tolerance)
    return torch_times(function, args, repeats=repeats), error


def _by_kernels(case: Case, function: Function, args: Args, checked: Args, reference: Any, repeats: int) -> Timed:
    program = rotated(function)
    check(error := _largest(relative_error(result, reference) for result in program(args)), case.tolerance)
    return kernel_times(program, args, repeats=repeats, calls=len(args)), error


def case_record(case: Case, ours: Outcome, peers: dict[str, Outcome], chip: Chip, ceilings: Ceilings) -> dict[str, Any]:
    """The JSON object of one case: "error" in place of figures where there are none, "met" null off an H200."""
    floor = case.floor_us(chip)
    measured_floor = case.floor_us(ceilings.applied_to(chip))
    record: dict[str, Any] = {
        **dataclasses.asdict(case.shape),
        "dtype": case.dtype,
        "note": case.note,
        "flops": case.flops,
        "hbm_bytes": case.hbm_bytes,
        "goal": dataclasses.asdict(case.goal),
        "floor_us": floor,
        "measured_floor_us": measured_floor,
    }
    if isinstance(ours, str):
        return {**record, "error": ours, "met": None, "peers": {name: _peer(o, None) for name, o in peers.items()}}
    microseconds = ours.time.median_us
    return {
        **record,
        **ours.record(),
        "tflops": case.flops / microseconds / 1e6,
        "tb_per_s": case.hbm_bytes / microseconds / 1e6,
        "share_of_floor": floor / microseconds,
        "share_of_measured_floor": measured_floor / microseconds,
        "met": case.goal.is_met(microseconds, case.flops) if chip.name == _GOALS_CHIP else None,
        "peers": {name: _peer(outcome, microseconds) for name, outcome in peers.items()},
    }


def _peer(outcome: Outcome, ours_us: float | None) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {"error": outcome}
    ratio = None if ours_us is None else outcome.time.median_us / ours_us
    return {**outcome.record(), "ratio": ratio}


def _largest(errors: Iterable[float]) -> float:
    """The largest of the errors, NaN if one is."""
    return float(np.max(list(errors)))

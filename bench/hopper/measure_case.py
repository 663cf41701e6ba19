"""Measures a case: each implementation is checked against the right answer first, and timed if it is right."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.ceilings import Ceilings
from bench.hopper.goals import Case
from bench.hopper.peers import Implementation, from_torch
from bench.measure.clock import KernelTime, copies_of, kernel_times, rotated, torch_times, wall_times
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

    time: KernelTime
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
    try:
        args = [implementation.prepare(*one) for one in inputs]
    except Exception as error:
        return describe(error)
    outcomes: list[Measurement] = []
    reasons: list[str] = []
    for name, function in implementation.functions.items():
        try:
            if case.clock == "wall":
                to_check = checked or args[0]
                outcomes.append(_measure_by_wall(case, name, function, args[0], to_check, reference, repeats))
            else:
                outcomes.append(_measure(case, implementation.framework, name, function, args, reference, repeats))
        except Exception as error:
            reasons.append(describe(error))
    if outcomes:
        return min(outcomes, key=lambda outcome: outcome.time.median_us)
    return reasons[0]


def _measure_by_wall(
    case: Case,
    name: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    checked: Sequence[Any],
    reference: Any,
    repeats: int,
) -> Measurement:
    whole = jax.jit(function)
    check(error := relative_error(whole(*checked), reference), case.tolerance)
    return Measurement(wall_times(whole, *args, repeats=repeats, calls=case.calls), error, name)


def _measure(
    case: Case,
    framework: str,
    name: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    reference: Any,
    repeats: int,
) -> Measurement:
    if framework == "torch":
        check(error := max(relative_error(from_torch(function(*one)), reference) for one in args), case.tolerance)
        return Measurement(torch_times(function, args, repeats=repeats), error, name)
    program = rotated(function)
    check(error := max(relative_error(result, reference) for result in program(args)), case.tolerance)
    return Measurement(kernel_times(program, args, repeats=repeats, calls=len(args)), error, name)


@jax.jit
def _relative_error(result: Any, reference: Any) -> jax.Array:
    def one(x, right):
        return jnp.linalg.norm((x.astype(jnp.float32) - right).ravel()) / jnp.linalg.norm(right.ravel())

    # With jnp.maximum a NaN stays one.
    return functools.reduce(jnp.maximum, jax.tree.leaves(jax.tree.map(one, result, reference)))


def relative_error(result: Any, reference: Any) -> float:
    """The largest relative error, by norm, of the leaves of `result`."""
    return float(_relative_error(result, reference))


def check(error: float, tolerance: float) -> None:
    """Raises ValueError if `error` exceeds the tolerance, or is not a number."""
    if not error <= tolerance:
        raise ValueError(f"wrong result: relative error {error:.1e}, limit {tolerance:.0e}")


def describe(error: Exception) -> str:
    """One short line on an exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


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

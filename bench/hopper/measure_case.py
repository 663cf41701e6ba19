"""Measures a case: each implementation is checked against the right answer first, and timed if it is right."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bench.hopper.cases import Case
from bench.hopper.ceilings import Ceilings
from bench.hopper.peers import Implementation, from_torch
from bench.measure.clock import copies_of, kernel_times, rotated, torch_times, torch_wait, wall_times
from bench.measure.errors import check, describe, relative_error
from bench.measure.timeline import last_call, recorded, spans
from pallas_kernels.chips import Chip

_GOALS_CHIP = "h200"

Outcome = dict[str, Any]
"""What came of an implementation, for JSON: its times in µs, its error and the configuration that was the fastest.

Where nothing did, "error" is the reason. Of what is timed by the wall clock on a GPU, "timeline" has the launches of
the last call in a program, as the profiler saw them, and "device_us" is what a call takes there from the first launch
of a program to the last one: less than the wall clock's time if the device waits for the host.
"""


def measure_case(case: Case, *, repeats: int, with_peers: bool) -> tuple[Outcome, dict[str, Outcome]]:
    """Ours, and each peer by name, on the same inputs."""
    problem = case.build(case.shape)
    inputs = [problem.inputs] if problem.calls else copies_of(problem.inputs)
    reference = jax.block_until_ready(jax.jit(problem.reference)(*(problem.checked or problem.inputs)))

    def measured(implementation: Implementation) -> Outcome:
        return attempt(
            implementation, inputs, reference, case.tolerance, repeats, calls=problem.calls, checked=problem.checked
        )

    ours = measured(problem.ours)
    return ours, {peer.name: measured(peer) for peer in (problem.peers if with_peers else ())}


def attempt(
    implementation: Implementation,
    inputs: Sequence[Any],
    reference: Any,
    tolerance: float,
    repeats: int,
    calls: int | None = None,
    checked: tuple[Any, ...] | None = None,
) -> Outcome:
    """Measures `implementation`; whatever it raises becomes the reason, as one case must not end the others."""
    if (reason := implementation.why_not()) is not None:
        return {"error": reason}
    try:
        args = [implementation.prepare(*one) for one in inputs]
    except Exception as error:
        return {"error": describe(error)}

    def worst(results: Iterable[Any]) -> float:
        """The largest error of the results, which must be right."""
        error = float(np.max([relative_error(result, reference) for result in results]))  # NaN if one is
        check(error, tolerance)
        return error

    def measure(name: str) -> Outcome:
        timeline: list[dict[str, Any]] = []
        device_us: float | None = None
        function = implementation.functions[name]
        in_torch = implementation.package == "torch"
        if calls is not None:
            program = function if in_torch else jax.jit(function)
            result = program(*(implementation.prepare(*checked) if checked else args[0]))
            error = worst([from_torch(result) if in_torch else result])
            wait = torch_wait if in_torch else jax.block_until_ready
            time = wall_times(program, *args[0], repeats=repeats, calls=calls, wait=wait)
            if not in_torch and jax.default_backend() == "gpu":
                launches = recorded(lambda: jax.block_until_ready(program(*args[0])))
                timeline = [dataclasses.asdict(launch) for launch in last_call(launches, calls)]
                (span,) = spans(launches, len(launches))
                device_us = span / calls
        elif in_torch:
            error = worst(from_torch(function(*one)) for one in args)
            time = torch_times(function, args, repeats=repeats)
        else:
            rotating = rotated(function)
            error = worst(rotating(args))
            time = kernel_times(rotating, args, repeats=repeats, calls=len(args))
        return {
            "us": time.median_us,
            "min_us": time.min_us,
            "spread_us": time.spread_us,
            "relative_error": error,
            "configuration": name,
            "kernels": list(time.kernels),
            "timeline": timeline,
            "device_us": device_us,
        }

    outcomes: list[Outcome] = []
    for name in implementation.functions:
        try:
            outcomes.append(measure(name))
        except Exception as error:
            outcomes.append({"error": describe(error)})
    return min(outcomes, key=lambda outcome: outcome.get("us", math.inf))


def case_record(
    case: Case, ours: Outcome, peers: Mapping[str, Outcome], chip: Chip, ceilings: Ceilings
) -> dict[str, Any]:
    """The JSON object of one case: "error" in place of figures where there are none, "met" null off an H200."""
    floor = case.floor_us(chip)
    measured_floor = case.floor_us(ceilings.applied_to(chip))
    microseconds = ours.get("us")
    figures: dict[str, Any] = {"met": None}
    if microseconds is not None:
        figures = {
            "tflops": case.flops / microseconds / 1e6,
            "tb_per_s": case.hbm_bytes / microseconds / 1e6,
            "share_of_floor": floor / microseconds,
            "share_of_measured_floor": measured_floor / microseconds,
            "met": case.goal.is_met(microseconds, case.flops) if chip.name == _GOALS_CHIP else None,
        }
    return {
        **dataclasses.asdict(case.shape),
        "dtype": case.dtype,
        "note": case.note,
        "flops": case.flops,
        "hbm_bytes": case.hbm_bytes,
        "goal": dataclasses.asdict(case.goal),
        "floor_us": floor,
        "measured_floor_us": measured_floor,
        **ours,
        **figures,
        "peers": {name: _beside(peer, microseconds) for name, peer in peers.items()},
    }


def _beside(peer: Outcome, ours_us: float | None) -> dict[str, Any]:
    """A peer's outcome with its time in multiples of ours."""
    return peer if "error" in peer else {**peer, "ratio": ours_us and peer["us"] / ours_us}

"""How runs compare after a while and later: loss, its rank, what a router or a precision costs, balance of experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.measure.samples import Interval
from bench.record.tables import Cell
from bench.training.records import Run
from bench.training.settings import BASELINE_ROUTER, Variant

Table = tuple[list[str], list[list[Cell]]]
"""Headers and rows."""

Differences = Mapping[Variant, Mapping[int, Sequence[float]]]
"""Of a variant, after each number of steps, its loss less that of another with the same seed, for each such seed."""

_MOST_STEPS_SHOWN = 5


def by_variant(runs: Sequence[Run]) -> dict[Variant, list[Run]]:
    """The runs of each variant, in the order in which variants first come."""
    groups: dict[Variant, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def losses_after(runs: Sequence[Run]) -> dict[int, dict[int, float]]:
    """The held-out loss after each number of steps, of each seed; without those that are not finite."""
    found: dict[int, dict[int, float]] = {}
    for run in runs:
        for look in run.held_out:
            if look["loss"] is not None:
                found.setdefault(look["step"], {})[run.head["seed"]] = look["loss"]
    return found


def steps_shown(runs: Sequence[Run]) -> list[int]:
    """The last look, that at half as many steps or the nearest before it, and so on: five at the most, in order."""
    looks = sorted({look["step"] for run in runs for look in run.held_out if look["step"]})
    shown: list[int] = []
    while looks and len(shown) < _MOST_STEPS_SHOWN:
        shown.append(looks[-1])
        looks = [look for look in looks if look <= shown[-1] / 2]
    return shown[::-1]


def loss_table(runs: Sequence[Run]) -> Table:
    """Of each variant the mean loss, its 95 % interval and, if it is causal, its rank among those of its precision."""
    steps = steps_shown(runs)
    groups = by_variant(runs)
    means = {
        variant: {step: Interval.of(list(losses.values())) for step, losses in losses_after(group).items()}
        for variant, group in groups.items()
    }
    rows: list[list[Cell]] = []
    for variant in groups:
        row: list[Cell] = [variant.name]
        for step in steps:
            own = means[variant].get(step)
            rivals = [each for each in groups if each.precision == variant.precision and groups[each][0].head["causal"]]
            rank = None
            if own and variant in rivals:
                rank = 1 + sum(means[each][step].mean < own.mean for each in rivals if step in means[each])
            row += [_plus_minus(own), rank]
        rows.append(row)
    return ["router", *(header for step in steps for header in (f"{step:,}", f"rank at {step:,}"))], rows


def difference_table(runs: Sequence[Run], differences: Differences) -> Table:
    """The mean of the differences of each variant, with its 95 % interval and how many seeds there are."""
    steps = steps_shown(runs)
    rows: list[list[Cell]] = []
    for variant, found in differences.items():
        row: list[Cell] = [variant.name]
        for step in steps:
            values = found.get(step, [])
            row += [_plus_minus(Interval.of(values) if values else None), len(values)]
        rows.append(row)
    return ["router", *(header for step in steps for header in (f"{step:,}", f"seeds at {step:,}"))], rows


def router_differences(runs: Sequence[Run]) -> Differences:
    """Of each router in each precision, from the plain softmax router in the same precision."""
    return _differences(runs, lambda variant: Variant(BASELINE_ROUTER, variant.precision))


def precision_differences(runs: Sequence[Run]) -> Differences:
    """Of each router in each other precision, from the same router in the usual one."""
    return _differences(runs, lambda variant: Variant(variant.router))


def _differences(runs: Sequence[Run], baseline_of: Callable[[Variant], Variant]) -> Differences:
    groups = by_variant(runs)
    found = {}
    for variant, group in groups.items():
        baseline = baseline_of(variant)
        usual = losses_after(groups.get(baseline, ()))
        if variant != baseline and usual:
            found[variant] = {
                step: [loss - usual[step][seed] for seed, loss in losses.items() if seed in usual.get(step, {})]
                for step, losses in losses_after(group).items()
            }
    return found


def balance_table(runs: Sequence[Run]) -> Table:
    """Of each variant the least entropy of a layer's held-out load, and the largest of load over mean: seeds' means."""
    steps = steps_shown(runs)
    rows: list[list[Cell]] = []
    for variant, group in by_variant(runs).items():
        row: list[Cell] = [variant.name]
        for step in steps:
            looks = [look for run in group for look in run.held_out if look["step"] == step]
            entropy, busiest = _mean(looks, least_entropy), _mean(looks, busiest_load)
            row.append("-" if entropy is None or busiest is None else f"{entropy:.2f} / {busiest:.1f}")
        rows.append(row)
    return ["router", *(f"{step:,}" for step in steps)], rows


def least_entropy(look: Mapping[str, Any]) -> float:
    """Over the layers, of the load in a "held_out" record; NaN if it is not finite."""
    return min(np.nan if entropy is None else entropy for entropy in look["load_entropy"])


def busiest_load(look: Mapping[str, Any]) -> float:
    """Over the layers, the load of the busiest expert over the mean."""
    load = np.asarray(look["load"], np.float64)
    return float((load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-6)).max())


def _mean(looks: Sequence[Mapping[str, Any]], figure: Callable[[Mapping[str, Any]], float]) -> float | None:
    values = [value for value in map(figure, looks) if np.isfinite(value)]
    return float(np.mean(values)) if values else None


def _plus_minus(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.mean:.4f}" if interval.half is None else f"{interval.mean:.4f} ± {interval.half:.4f}"

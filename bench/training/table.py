"""Routers and precisions beside each other: means over seeds with their confidence, and what is amiss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.measure.samples import Interval
from bench.record.tables import Cell
from bench.training.over_time import by_variant
from bench.training.records import Run
from bench.training.settings import BASELINE_ROUTER

Finished = Mapping[str, Any]
"""The "run" and the "end" record of a run together."""

HEADERS = (
    "router", "seeds", "held-out loss", "± 95 %", f"against {BASELINE_ROUTER}", "± 95 %", "bits/byte", "words %",
    "brackets %", "ms/step", "tokens/s", "drops %", "load CV", "least entropy", "M params", "M active", "notes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RouterSummary:
    """A router in a precision, over its finished runs.

    Attributes:
      router: the name of the variant.
      causal: whether a token's output depends on no later token.
      seeds: finished runs.
      held_out_loss: in nats a byte, of the runs that did not diverge; None if all did.
      against_baseline: the same less that of the plain softmax router with the same seed, which saw the same data; so
        it can be sure where the intervals of two losses overlap. None for that router, or without seeds in common.
      ms_per_step: of each run the median.
      word_accuracy, bracket_accuracy: of `bench.training.skills`, means over the runs; None if not counted.
      bits_per_byte, tokens_per_second, drop_rate, load_cv: means over the runs.
      least_entropy: of the held-out load at the end, over layers and runs; None if it is not finite.
      unrouted_rate: share of the held-out tokens of a layer that no expert took, likewise.
      parameters, active_parameters: of the model; see `bench.training.runs.summary`.
      collapsed: for each run that ended with collapsed layers, "seed: layers".
      diverged: the seeds whose loss ceased to be finite.
    """

    router: str
    causal: bool
    seeds: int
    held_out_loss: Interval | None
    against_baseline: Interval | None
    ms_per_step: Interval
    bits_per_byte: float | None
    word_accuracy: float | None
    bracket_accuracy: float | None
    tokens_per_second: float
    drop_rate: float
    load_cv: float
    unrouted_rate: float
    least_entropy: float | None
    parameters: int
    active_parameters: int
    collapsed: tuple[str, ...]
    diverged: tuple[int, ...]


def summaries(runs: Sequence[Run]) -> list[RouterSummary]:
    """A summary of each variant that has finished runs: first those that are causal, by held-out loss."""
    finished = {
        variant.name: [{**run.head, **run.end} for run in group if run.end is not None]
        for variant, group in by_variant(runs).items()
    }
    baseline = _losses(finished.get(BASELINE_ROUTER, ()))
    found = [_summary(name, group, baseline) for name, group in finished.items() if group]
    return sorted(found, key=lambda row: (not row.causal, row.held_out_loss.mean if row.held_out_loss else np.inf))


def table_rows(rows: Sequence[RouterSummary]) -> list[list[Cell]]:
    """Under `HEADERS`."""
    return [
        [
            row.router,
            row.seeds,
            *_cells(row.held_out_loss),
            *_cells(row.against_baseline),
            row.bits_per_byte,
            None if row.word_accuracy is None else 100 * row.word_accuracy,
            None if row.bracket_accuracy is None else 100 * row.bracket_accuracy,
            row.ms_per_step.mean,
            round(row.tokens_per_second),
            100 * row.drop_rate,
            row.load_cv,
            row.least_entropy,
            row.parameters / 1e6,
            row.active_parameters / 1e6,
            ", ".join(_notes(row)),
        ]
        for row in rows
    ]


def warnings_of(rows: Sequence[RouterSummary]) -> list[str]:
    """A sentence on each thing that a reader of the table must know."""
    lines = []
    for row in rows:
        if row.collapsed:
            lines.append(f"{row.router} collapsed, most tokens go to few experts: {'; '.join(row.collapsed)}")
        if row.diverged:
            lines.append(f"{row.router} diverged with the seeds {', '.join(map(str, row.diverged))}")
    acausal = [row.router for row in rows if not row.causal]
    if acausal:
        lines.append(
            f"not causal: {', '.join(acausal)}. What a token gets depends on later tokens, so the held-out loss knows "
            "the future and cannot be compared with the others'"
        )
    return lines


def _cells(interval: Interval | None) -> tuple[Cell, Cell]:
    return (None, None) if interval is None else (interval.mean, interval.half)


def _notes(row: RouterSummary) -> list[str]:
    notes = [] if row.causal else ["not causal"]
    notes += [f"{100 * row.unrouted_rate:.0f} % of tokens without expert"] * (row.unrouted_rate > 0)
    return notes + ["COLLAPSED"] * bool(row.collapsed) + ["DIVERGED"] * bool(row.diverged)


def _losses(runs: Sequence[Finished]) -> dict[int, float]:
    """The held-out loss of each seed, of the runs that did not diverge."""
    sound = [run for run in runs if not run["diverged"] and run["held_out_loss"] is not None]
    return {run["seed"]: run["held_out_loss"] for run in sound}


def _summary(router: str, runs: Sequence[Finished], baseline: Mapping[int, float]) -> RouterSummary:
    losses = _losses(runs)
    differences = [loss - baseline[seed] for seed, loss in losses.items() if seed in baseline]
    entropies = [entropy for run in runs for entropy in run["load_entropy"] if entropy is not None]
    loss = Interval.of(list(losses.values())) if losses else None

    def mean(name: str) -> float:
        return float(np.mean([run[name] for run in runs]))

    return RouterSummary(
        router=router,
        causal=runs[0]["causal"],
        seeds=len(runs),
        held_out_loss=loss,
        against_baseline=Interval.of(differences) if differences and router != BASELINE_ROUTER else None,
        ms_per_step=Interval.of([run["ms_per_step"] for run in runs]),
        word_accuracy=mean("word_accuracy") if "word_accuracy" in runs[0] else None,
        bracket_accuracy=mean("bracket_accuracy") if "bracket_accuracy" in runs[0] else None,
        bits_per_byte=None if loss is None else loss.mean / float(np.log(2)),
        tokens_per_second=mean("tokens_per_second"),
        drop_rate=mean("drop_rate"),
        load_cv=mean("load_cv"),
        unrouted_rate=mean("unrouted_rate"),
        least_entropy=min(entropies, default=None),
        parameters=runs[0]["parameters"],
        active_parameters=round(mean("active_parameters")),
        collapsed=tuple(f"seed {run['seed']}: {_collapsed(run)}" for run in runs if run["collapsed"]),
        diverged=tuple(run["seed"] for run in runs if run["diverged"]),
    )


def _collapsed(run: Finished) -> str:
    entropies = [(layer, run["load_entropy"][layer]) for layer in run["collapsed_layers"]]
    shown = [(layer, "not finite" if entropy is None else f"{entropy:.2f}") for layer, entropy in entropies]
    return ", ".join(f"layer {layer} (entropy {entropy})" for layer, entropy in shown)

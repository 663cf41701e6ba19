"""Figures of `bench.train`: held-out curves, what routers and precisions cost, quality against speed, experts' load."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.figures.section import INK, Section, drawing, svg_of
from bench.measure.samples import Interval
from bench.record.tables import Cell
from bench.training.over_time import (
    Differences,
    busiest_load,
    by_variant,
    least_entropy,
    precision_differences,
    router_differences,
)
from bench.training.records import FILE_NAME, Run
from bench.training.settings import BASELINE_PRECISION, BASELINE_ROUTER
from bench.training.table import HEADERS, RouterSummary, summaries, table_rows, warnings_of

_CURVES, _PARETO, _LOAD = "Held-out loss over training", "Quality against speed", "Load of the experts over training"
_BALANCE = "Balance of the experts over training"
_MAX_LAYERS = 3


def sections(runs: Mapping[str, Run]) -> list[Section]:
    """The figures, each with its reason where it cannot be drawn; those of differences only where there are some."""
    every = list(runs.values())
    return [_pareto(summaries(every)), _curves(every), *_costs(every), _balance(every), _load(every)]


def _missing(name: str, title: str, what: str) -> Section:
    return Section(name, title, f"Left out: {FILE_NAME} has {what}; python -m bench.train writes it.")


def _pareto(rows: Sequence[RouterSummary]) -> Section:
    shown = [(row, row.held_out_loss) for row in rows if row.held_out_loss is not None]
    if not shown:
        return _missing("pareto", _PARETO, "no finished run")
    # The causal routers that none is both faster and better than, by time.
    points = sorted((row.ms_per_step.mean, loss.mean) for row, loss in shown if row.causal)
    best = [point for place, point in enumerate(points) if all(point[1] < loss for _, loss in points[:place])]
    with drawing("pareto") as pyplot:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        colours = _colours(pyplot, [row.router for row, _ in shown])
        for row, loss in shown:
            axes.errorbar(
                row.ms_per_step.mean,
                loss.mean,
                xerr=row.ms_per_step.half,
                yerr=loss.half,
                fmt="X" if row.collapsed else "o",
                color=colours[row.router],
                markerfacecolor=colours[row.router] if row.causal else "none",
                elinewidth=0.8,
                capsize=3,
                label=row.router + " (not causal)" * (not row.causal) + " (collapsed)" * bool(row.collapsed),
            )
        axes.step(*np.reshape(best, (-1, 2)).T, where="post", color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("ms a step (median of a run, mean over seeds)")
        axes.set_ylabel("held-out loss, nats a byte")
        # Beside the points, names would lie on one another: routers are often close.
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        svg = svg_of(figure)
    text = (
        "Down and to the left is better. Bars are 95 % confidence intervals over seeds, where there are two or more; "
        "the dotted line joins the routers that no other beats in both. "
        f"Hollow: not causal, the loss knows the future. {' '.join(f'{line}.' for line in warnings_of(rows))}"
    )
    return Section("pareto", _PARETO, text, svg, HEADERS, table_rows(rows))


def _curves(runs: Sequence[Run]) -> Section:
    curves = {each.name: curve for each, group in by_variant(runs).items() if (curve := _curve(group))}
    if not curves:
        return _missing("curves", _CURVES, "no look at held-out text")
    causal = {run.variant.name: run.head["causal"] for run in runs}
    table: list[list[Cell]] = []
    with drawing("curves") as pyplot:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        colours = _colours(pyplot, curves)
        for router, curve in curves.items():
            drawn = dict(curve[1:] or curve)
            _band(axes, list(drawn), list(drawn.values()), colours[router], router, "-" if causal[router] else "--")
            table += [[router, place, value.mean, value.half] for place, value in curve]
        axes.set_xlabel("tokens (bytes) trained on")
        axes.set_ylabel("held-out loss, nats a byte")
        axes.legend(fontsize=8)
        svg = svg_of(figure)
    text = (
        "Means over seeds, with their 95 % confidence. Dashed: not causal, the loss knows the future. The look before "
        "the first step is only in the table."
    )
    return Section("curves", _CURVES, text, svg, ("router", "tokens", "held-out loss", "± 95 %"), table)


def _curve(runs: Sequence[Run]) -> list[tuple[int, Interval]]:
    """(tokens seen, loss) at each look that all of the runs had."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        tokens_a_step = run.head["settings"]["batch_size"] * run.head["settings"]["length"]
        for look in run.held_out:
            if look["loss"] is not None:
                losses.setdefault(look["step"] * tokens_a_step, []).append(look["loss"])
    return [(place, Interval.of(values)) for place, values in sorted(losses.items()) if len(values) == len(runs)]


def _costs(runs: Sequence[Run]) -> list[Section]:
    by_router, by_precision = router_differences(runs), precision_differences(runs)
    causal = {run.variant.name: run.head["causal"] for run in runs}
    sections = []
    if any(by_router.values()):
        title, less = "What a router costs over training", f"of {BASELINE_ROUTER} with the same precision and seed"
        sections.append(_differences("routers", title, by_router, causal, less))
    if any(by_precision.values()):
        title, less = "What a precision costs over training", f"in {BASELINE_PRECISION} with the same router and seed"
        # Among all variants, the precisions of a router would have almost the same colour.
        shown = {variant.name: causal[variant.name] for variant in by_precision}
        sections.append(_differences("precisions", title, by_precision, shown, less))
    return sections


def _differences(name: str, title: str, found: Differences, causal: Mapping[str, bool], less: str) -> Section:
    intervals = {
        variant.name: {step: Interval.of(values) for step, values in sorted(differences.items()) if step and values}
        for variant, differences in found.items()
    }
    # The legend names lines in the order in which they end, from the top.
    drawn = sorted(
        (each for each in intervals.items() if each[1]), key=lambda each: list(each[1].values())[-1].mean, reverse=True
    )
    table: list[list[Cell]] = []
    with drawing(name) as pyplot:
        figure, axes = pyplot.subplots(figsize=(8, 4))
        colours = _colours(pyplot, causal)
        for variant, means in drawn:
            _band(axes, list(means), list(means.values()), colours[variant], variant, "-" if causal[variant] else "--")
            table += [[variant, step, each.mean, each.half] for step, each in means.items()]
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set_xlabel("steps")
        axes.set_ylabel("difference of held-out loss, nats a byte")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        svg = svg_of(figure)
    text = (
        f"Held-out loss less that {less}, which saw the same data: means over seeds, with their 95 % confidence. Above "
        "the line, it costs quality. Dashed: not causal, the loss knows the future."
    )
    return Section(name, title, text, svg, ("router", "step", "difference", "± 95 %"), table)


def _balance(runs: Sequence[Run]) -> Section:
    groups = {each: group for each, group in by_variant(runs).items() if _over_looks(group, busiest_load)}
    if not groups:
        return _missing("balance", _BALANCE, "no look at held-out text after the first step")
    table: list[list[Cell]] = []
    with drawing("balance") as pyplot:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        colours = _colours(pyplot, [variant.name for variant in groups])
        for variant, group in groups.items():
            entropies, busiest = _over_looks(group, least_entropy), _over_looks(group, busiest_load)
            for axes, figures in ((left, entropies), (right, busiest)):
                means = [each.mean for each in figures.values()]
                axes.plot(list(figures), means, color=colours[variant.name], marker=".", label=variant.name)
            table += [[variant.name, step, entropies[step].mean, busiest[step].mean] for step in entropies]
        left.set_ylabel("least entropy of a layer's load")
        right.set_ylabel("load of the busiest expert, over the mean")
        right.set_yscale("log")
        left.set_xlabel("steps")
        right.set_xlabel("steps")
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        svg = svg_of(figure)
    text = "Of held-out text, the worst layer: means over seeds. 1 is a balanced load."
    return Section("balance", _BALANCE, text, svg, ("router", "step", "least entropy", "busiest"), sorted(table))


def _over_looks(runs: Sequence[Run], figure: Callable[[Mapping[str, Any]], float]) -> dict[int, Interval]:
    """A figure of "held_out" records at each look after the first, where it is finite."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for look in run.held_out:
            if look["step"] and np.isfinite(value := figure(look)):
                found.setdefault(look["step"], []).append(value)
    return {step: Interval.of(values) for step, values in sorted(found.items())}


def _band(
    axes: Any, places: Sequence[int], values: Sequence[Interval], colour: Any, label: str, style: str = "-"
) -> None:
    """A line of means within their confidence."""
    means, half = np.array([each.mean for each in values]), np.array([each.half or 0.0 for each in values])
    axes.plot(places, means, style, color=colour, marker=".", label=label)
    axes.fill_between(places, means - half, means + half, color=colour, alpha=0.12, linewidth=0)


def _load(runs: Sequence[Run]) -> Section:
    firsts = [group[0] for group in by_variant(runs).values() if len(group[0].held_out) > 1]
    if not firsts:
        return _missing("load", _LOAD, "no run with two looks at held-out text")
    num_layers = len(firsts[0].held_out[0]["load"])
    layers = sorted({round(place) for place in np.linspace(0, num_layers - 1, min(num_layers, _MAX_LAYERS))})
    shares = [_shares(run) for run in firsts]
    with drawing("load") as pyplot:
        size = 1 + 3.2 * len(layers), 0.6 + 1.3 * len(firsts)
        figure, grid = pyplot.subplots(
            len(firsts), len(layers), figsize=size, squeeze=False, sharex=True, layout="constrained"
        )
        limit = min(4.0, max(float(share[:, layers].max()) for share in shares))
        for row, run, share in zip(grid, firsts, shares, strict=True):
            looks, _, experts = share.shape
            places = sorted({0, looks // 2, looks - 1})
            scale = {"vmin": 0, "vmax": limit, "extent": (-0.5, looks - 0.5, experts - 0.5, -0.5)}
            for axes, layer in zip(row, layers, strict=True):
                axes.grid(visible=False)
                image = axes.imshow(share[:, layer].T, aspect="auto", interpolation="nearest", **scale)
                axes.set_yticks([0, experts - 1])
                axes.set_xticks(places, [str(run.held_out[place]["step"]) for place in places])
            row[0].set_ylabel(run.variant.name, rotation=0, ha="right", va="center")
        for axes, layer in zip(grid[0], layers, strict=True):
            axes.set_title(f"layer {layer}", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        figure.colorbar(image, ax=grid, label="load of an expert over the mean", shrink=0.6)
        svg = svg_of(figure)
    text = (
        f"Each row of a panel is an expert, each column a look at the held-out text, seed {firsts[0].head['seed']}: 1 "
        "is a balanced load. The table gives the entropy of each layer's load at the end, 1 when balanced, 0 when one "
        "expert takes all."
    )
    lasts = [(run.variant.name, run.held_out[-1]) for run in firsts]
    table = [[router, look["step"], *look["load_entropy"]] for router, look in lasts]
    return Section("load", _LOAD, text, svg, ("router", "step", *(f"layer {n}" for n in range(num_layers))), table)


def _shares(run: Run) -> np.ndarray:
    """[looks, layers, E]: load over its mean."""
    load = np.array([look["load"] for look in run.held_out], np.float64)
    return load / np.maximum(load.mean(axis=2, keepdims=True), 1e-12)


def _colours(pyplot: Any, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    # By name, so that a router has the same colour in every figure.
    colours = pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return {name: colours[place % len(colours)] for place, name in enumerate(sorted(names))}

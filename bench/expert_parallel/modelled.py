"""What the cost models say of a step, as tables for people and a picture."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from itertools import groupby

from bench.figures.section import drawing, require_matplotlib, standalone, svg_of
from bench.model.evaluation import build_evaluation
from bench.model.operator_time import OperatorTime
from bench.model.times import LayerTime, StepTime
from bench.record.files import write_whole
from bench.record.json_files import write_json
from bench.record.tables import Cell, format_table

Modelled = list[tuple[StepTime, StepTime]]
"""A layer of experts and the whole model's step, under every cache length and batch."""

_TIMES = ("comp µs", "dma µs", "link µs", "elapsed µs")


def show(modelled: Modelled, *, whole: bool, title: str, origin: Mapping[str, str], svg: str | None, json: str) -> None:
    """Tables, the picture and the JSON of layers or, if `whole`, of steps; several are a list in JSON.

    Args:
      modelled: what the models say.
      whole: which of the two is written and drawn.
      title: model, chips and precision, in a few words.
      origin: what to add to "run_info" in JSON.
      svg: the picture's file, None for none.
      json: the file for the JSON, "-" for standard output and nothing else there.

    Raises:
      ValueError: there is to be a picture, and matplotlib is not installed.
      OSError: a file cannot be written.
    """
    wanted = [step if whole else layer for layer, step in modelled]
    evaluations = [build_evaluation(step, run_info=origin) for step in wanted]
    if svg is not None:
        write_curve(wanted, title, pathlib.Path(svg))
    write_json(evaluations if len(evaluations) > 1 else evaluations[0], json)
    if json == "-":
        return
    first = wanted[0]
    print(f"{title}, modelled: chip {first.chip.name}, {first.model} model")
    if len(wanted) == 1:
        ((_, step),) = modelled
        print(f"{operators_table(first)}\n\n{step_table(step)}\n\n{step_summary(step)}\n")
    else:
        print(f"{sweep_table(wanted)}\n")
    print("\n".join(f"wrote {path}" for path in (svg, json) if path is not None))


def operators_table(step: StepTime) -> str:
    """One line an operator with its modelled times in µs and traffic in MB; of one layer their sums as well."""
    headers = ["operator", "shape", *_TIMES, "traffic MB", "urate %"]
    if len(step.layers) > 1:
        named = [[time.layer.name, *_operator_row(operator)] for time in step.layers for operator in time.operators]
        return format_table(["layer", *headers], named)
    rows = [_operator_row(operator) for operator in step.operators]
    sums = [sum(float(row[i] or 0) for row in rows) for i in range(2, 7)]
    return format_table(headers, [*rows, ["total", "", *sums, None]])


def _operator_row(operator: OperatorTime) -> list[Cell]:
    times = [operator.comp_elapsed, operator.dma_elapsed, operator.link_elapsed, operator.elapsed]
    utilisation = operator.urate * 100 if operator.shape else None
    return [operator.name, str(operator.shape or ""), *times, operator.dram_traffic / 1e6, utilisation]


def step_table(step: StepTime) -> str:
    """One line a kind of layer: times of one, time of all of them, and what bounds it."""

    def parts(time: LayerTime | StepTime) -> list[Cell]:
        return [time.total(f"{part}_elapsed") for part in ("comp", "dma", "link")]

    rows: list[list[Cell]] = []
    for time in step.layers:
        whole = time.layer.count * time.elapsed
        share = 100 * whole / step.elapsed
        rows.append([time.layer.name, time.layer.count, *parts(time), time.elapsed, whole, share, time.bound])
    rows.append(["whole step", None, *parts(step), None, step.elapsed, 100.0, step.bound])
    return format_table(["layer", "count", *_TIMES, "all µs", "all %", "bound by"], rows)


def step_summary(step: StepTime) -> str:
    """Rates, utilisation and memory of a whole model's step."""
    lookup = next(operator for operator in step.operators if operator.kind == "lookup")
    exchange = f"of which dispatch and combine {step.comm_elapsed:,.1f} µs"
    memory = f"weights {step.weight_bytes / 1e9:,.1f} GB, cache {step.cache_bytes / 1e9:,.1f} GB"
    if step.chip.hbm_bytes < math.inf:  # infinite where it is not known
        memory += f", of {step.chip.hbm_bytes / 1e9:,.1f} GB{'' if step.fits else ': TOO MUCH'}"
    rows: list[list[Cell]] = [
        ["time", f"{step.elapsed:,.1f} µs, {exchange}"],
        ["tokens/s", f"{step.tps:,.1f}, {step.tps_per_chip:,.1f} a chip, {step.tps_per_batch:,.2f} a user"],
        [
            "MFU",
            f"{step.mfu:.1%} by DS_TPU's count, in which the embedding's lookup is a product of "
            f"{lookup.flops / 1e9:,.1f} GFLOP; {step.mfu_without_lookup:.1%} without",
        ],
        ["memory of a chip", memory],
    ]
    title = f"step of the whole model, batch {step.workload.batch_size}, kv {step.kv_len}"
    return format_table([title, ""], rows)


def sweep_table(steps: Sequence[StepTime]) -> str:
    """One line a batch and cache length."""
    rows: list[dict[str, Cell]] = [
        {
            "kv": step.kv_len,
            "batch": step.workload.batch_size,
            "step µs": step.elapsed,
            "tokens/s": step.tps,
            "tokens/s a chip": step.tps_per_chip,
            "tokens/s a user": step.tps_per_batch,
            "MFU % (no lookup)": 100 * step.mfu_without_lookup,
            "GB kept": (step.weight_bytes + step.cache_bytes) / 1e9,
            "bound by": step.bound + ("" if step.fits else f"; does not fit {step.chip.hbm_bytes / 1e9:,.0f} GB"),
        }
        for step in steps
    ]
    return format_table(list(rows[0]), [list(row.values()) for row in rows])


def write_curve(steps: Sequence[StepTime], title: str, path: pathlib.Path) -> None:
    """Draws tokens/s of a chip against those of a user, a line for each cache length, a point for each batch.

    Raises:
      ValueError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    require_matplotlib()
    with drawing("step") as pyplot:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for kv_len, points in groupby(steps, key=lambda step: step.kv_len):
            line = sorted(points, key=lambda step: step.workload.batch_size)
            users, chips = [step.tps_per_batch for step in line], [step.tps_per_chip for step in line]
            axes.plot(users, chips, marker="o", label=f"kv {kv_len}")
            for step, x, y in zip(line, users, chips, strict=True):
                note = f"{step.workload.batch_size}{'' if step.fits else ' (does not fit)'}"
                axes.annotate(note, (x, y), textcoords="offset points", xytext=(4, 4))
        axes.set(
            title=f"{title}, {steps[0].chip.name}: by batch",
            xlabel="tokens/s a user",
            ylabel="tokens/s a chip",
        )
        axes.set_ylim(bottom=0)
        axes.legend()
        write_whole(path, standalone(svg_of(figure)))

"""What a run of bench.decode gave, as tables for people and as the entry "measured" of evaluation.json."""

import dataclasses
from typing import Any

from bench.expert_parallel.communication import Communication
from bench.expert_parallel.decode_step import DecodeRun
from bench.expert_parallel.fit import Fit
from bench.expert_parallel.layer_stages import StageTimes
from bench.expert_parallel.modelled import Modelled, operators_table, step_summary, step_table
from bench.measure.devices import Devices
from bench.model.times import model_layer
from bench.model.workloads import Workload
from bench.record.tables import Cell, format_table


def print_report(workload: Workload, modelled: Modelled, result: DecodeRun, fitted: Fit, devices: Devices) -> None:
    """Prints what was measured, stage by stage, and what the models say of each chip: of a layer, and of a step."""
    load = result.load
    rows: list[list[Cell]] = [
        ["equals the dense oracle", f"relative error {result.relative_error:.1e} over {result.checked_tokens} tokens"],
        ["wall time of a step", f"{result.wall_seconds * 1e3:.1f} ms on {devices.note}, {fitted.width_note}"],
        [
            "tokens per expert",
            f"mean {workload.batch_size * workload.top_k / workload.num_experts:.1f}, CV "
            f"{float(load.cv):.2f}, entropy {float(load.entropy):.3f} of 1, most {int(load.tokens_per_expert.max())}",
        ],
        [
            "rows of the busiest chip",
            f"{result.busiest_rows} with this text; uniform routing: "
            f"{workload.busiest_rows:.0f} expected, {workload.token_per_ep_group} mean",
        ],
        *_communication_rows(result.communication),
        ["dropped", f"{int(load.dropped)} of {workload.batch_size * workload.top_k} assignments"],
    ]
    if (again := result.replicated) is not None:
        mean = workload.batch_size * workload.top_k / workload.ep
        rows += [
            [
                f"with {again.experts.size - workload.num_experts} spare slots",
                f"{again.busiest_rows} rows of the busiest chip, {again.busiest_rows / mean:.2f} times the mean "
                f"(without: {result.busiest_rows / mean:.2f})",
            ],
            ["", f"the same result to {again.difference:.1e}; {again.wall_seconds * 1e3:.1f} ms a step"],
        ]
    print(format_table(["measured", ""], rows))
    print()
    print(stages_table(result.stages))
    for layer, step in modelled:
        print(f"\nmodelled: chip {layer.chip.name}, {layer.model} model, full width")
        for name, own in _with_this_load(workload, result).items():
            print(f"the layer {name}: {model_layer(layer.chip, own).elapsed:,.1f} µs")
        print(operators_table(layer))
        print(f"\n{step_table(step)}\n\n{step_summary(step)}")
    if devices.is_virtual:
        print("\nThe wall time is that of virtual devices which share this machine's cores; it says nothing of a chip.")


def _communication_rows(communication: Communication | None) -> list[list[Cell]]:
    if communication is None:
        return []
    c = communication
    note = f"{c.exposed_us:.1f} µs exposed of {c.layer_us:.1f} a layer; its kernels take {c.link_us:.1f}, with waits"
    return [["communication", note]]


def _with_this_load(workload: Workload, result: DecodeRun) -> dict[str, Workload]:
    """The layer under the load that was measured, without and with its spare slots; nothing where there are none."""
    if result.replicated is None:
        return {}
    loaded = dataclasses.replace(workload, load=tuple(int(n) for n in result.load.tokens_per_expert))
    slots = tuple(int(expert) for expert in result.replicated.experts)
    return {
        "with this text's load": loaded,
        "with this text's load and spare slots": dataclasses.replace(loaded, slots=slots),
    }


def stages_table(stages: StageTimes) -> str:
    """A line a stage; on an NVIDIA GPU with the parts of the two products."""
    milliseconds = {name: seconds * 1e3 for name, seconds in stages.seconds.items()}
    if not stages.by_kernels:
        return format_table(["stage, run by itself", "wall ms"], [[*item] for item in milliseconds.items()])
    rows: list[list[Cell]] = []
    for name, time_ms in milliseconds.items():
        on_device = name in stages.by_kernels
        times: list[Cell] = [None if on_device else time_ms, time_ms if on_device else None]
        apart = stages.overlaps.get(name)
        product = [apart.elapsed, apart.comp_elapsed, apart.dma_elapsed, apart.overlap] if apart else [None] * 4
        rows.append([name, *times, *product, stages.link_us.get(name)])
    headers = ["stage, run by itself", "wall ms", "kernels ms", "product µs", "comp µs", "dma µs", "overlap", "link µs"]
    return format_table(headers, rows)


def measured_record(result: DecodeRun, fitted: Fit, devices: Devices) -> dict[str, Any]:
    """What goes under "measured" in evaluation.json."""
    load, again = result.load, result.replicated
    return {
        "devices": devices.note,
        "is_virtual": devices.is_virtual,
        "hidden_size": fitted.config.hidden_size,
        "intermediate_size": fitted.config.intermediate_size,
        "width_reduction": fitted.reduction,
        "transport": fitted.config.transport,
        "carried_by": result.transport,
        "wall_us": result.wall_seconds * 1e6,
        **stages_record(result.stages),
        "communication": result.communication and result.communication.record(),
        "relative_error": result.relative_error,
        "checked_tokens": result.checked_tokens,
        "busiest_rows": result.busiest_rows,
        "tokens_per_expert": [int(n) for n in load.tokens_per_expert],
        "load_cv": float(load.cv),
        "load_entropy": float(load.entropy),
        "dropped": int(load.dropped),
        "replicated": again
        and {
            "experts": [int(expert) for expert in again.experts],
            "difference": again.difference,
            "wall_us": again.wall_seconds * 1e6,
            "busiest_rows": again.busiest_rows,
        },
    }


def stages_record(stages: StageTimes) -> dict[str, Any]:
    """The entries on the stages among them."""
    times: dict[str, Any] = {"stages_us": {name: seconds * 1e6 for name, seconds in stages.seconds.items()}}
    if stages.by_kernels:
        times["stages_clock"] = {name: "kernels" if name in stages.by_kernels else "wall" for name in stages.seconds}
        times["link_us"] = stages.link_us
        times["products_us"] = {name: apart and apart.record() for name, apart in stages.overlaps.items()}
    return times

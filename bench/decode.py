"""A decode step of an expert-parallel layer: run for real, checked against the dense oracle, and modelled."""

import argparse
import datetime
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bench.command.parser import make_parser, run
from bench.expert_parallel.decode_step import TOLERANCE, DecodeRun, run_decode, tokens_of_text
from bench.expert_parallel.fit import Fit, fit
from bench.expert_parallel.layer_stages import StageTimes
from bench.inputs.text import default_text_path, read_text
from bench.inputs.weights import make_params
from bench.measure.devices import Devices, start
from bench.model.evaluation import build_evaluation
from bench.model.roofline import LayerTime, model_layer
from bench.model.workloads import Workload, moe_workload
from bench.record.tables import format_table, layer_table, write_json
from moejax import PRESETS, MoEConfig, get_preset
from moejax.config import PRECISIONS
from pallas_kernels.chips import CHIPS, chip_of, get_chip
from sharding.exchange_plan import local_experts
from sharding.mesh import make_mesh

_EXAMPLES = (
    "--ep 32",
    "--ep 8 --model mixtral-8x7b --batch 512 --precision w16a16",
    "--ep 32 --chip v6e --input book.txt --json -",
    "--ep 32 --coordinator 10.0.0.1:1234 --num-processes 4 --process-id 0   (on a cluster without auto-detection)",
)


def main(argv: Sequence[str]) -> int:
    """Runs, checks, models and prints; returns 1 when the layer differs from the oracle."""
    args = _parser().parse_args(argv)
    # All that can be said without devices is checked before any of them starts.
    config = get_preset(
        args.model, precision=args.precision, backend=args.backend, capacity_factor=args.capacity_factor
    )
    local_experts(config.num_experts, args.ep)
    workload = moe_workload(config, batch_size=args.batch, ep=args.ep, precision=args.precision, rounding=args.rounding)
    chips = [get_chip(args.chip)]
    path = pathlib.Path(args.input) if args.input else default_text_path()
    text = read_text(path)

    devices = start(args.ep, coordinator=args.coordinator, num_processes=args.num_processes, process_id=args.process_id)
    say = _progress(quiet=jax.process_index() != 0)
    fitted = fit(config, devices, args.batch, args.reduce)
    say(f"devices: {devices.note}")
    say(f"layer:   {args.model}, {fitted.note}")
    say(f"text:    {args.batch} places of {path}")
    result = _run(fitted.config, devices, text, args.batch, args.seed, say)

    if not devices.is_virtual and (own := chip_of(devices.devices[0])) is not None and own not in chips:
        chips.append(own)
    layers = [model_layer(chip, workload) for chip in chips]
    if jax.process_index() == 0:
        evaluation = build_evaluation(
            layers[0], run_info=_run_info(argv, args), measured=_measured(result, fitted, devices)
        )
        if args.json == "-":
            write_json(evaluation, "-")
        else:
            _print_report(args, workload, layers, result, fitted, devices)
            write_json(evaluation, args.json)
            print(f"\nwrote {args.json}")
    if not result.relative_error < TOLERANCE:
        say(f"FAILED: the layer differs from the dense oracle by {result.relative_error:.1e}, limit {TOLERANCE:.0e}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.decode",
        "Routes real text through one expert-parallel MoE layer on the devices at hand, checks it against the dense "
        "oracle, and prints modelled compute / DMA / elapsed times of every operator.",
        _EXAMPLES,
    )
    parser.add_argument("--ep", type=int, default=32, help="chips that share the experts (default 32)")
    parser.add_argument("--model", default="deepseek-v3", help=f"one of {', '.join(PRESETS)} (default deepseek-v3)")
    parser.add_argument("--batch", type=int, default=1536, help="sequences in all, a token of each (default 1536)")
    parser.add_argument(
        "--chip",
        default="seed",
        help=f"chip to model: {', '.join(CHIPS)}, or cores=64,tflops=768,gbps=8601.6 (default seed)",
    )
    parser.add_argument("--precision", default="w8a8", help=f"{' or '.join(PRECISIONS)} (default w8a8)")
    parser.add_argument("--input", metavar="FILE", help="text to route (default: a text that Python carries)")
    parser.add_argument(
        "--json", metavar="FILE", default="evaluation.json", help="where to write it, - for stdout only"
    )
    parser.add_argument("--capacity-factor", type=float, help="drop what exceeds it (default: drop nothing)")
    parser.add_argument("--reduce", type=int, metavar="N", help="divide the widths by N (default: as memory allows)")
    parser.add_argument("--backend", default="auto", help="auto, xla, pallas_tpu or pallas_gpu (default auto)")
    parser.add_argument("--rounding", default="round", help="activated experts: round (DS_TPU) or ceil (Tier6)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, embedding and places in the text (default 0)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, for a run over several hosts")
    parser.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    parser.add_argument("--process-id", type=int, metavar="I", help="number of this process")
    return parser


def _run(
    config: MoEConfig, devices: Devices, text, batch_size: int, seed: int, say: Callable[[str], None]
) -> DecodeRun:
    mesh = make_mesh(len(devices.devices), devices=devices.devices)
    say("making weights")
    params = jax.block_until_ready(make_params(config, mesh, seed))
    x = tokens_of_text(text, batch_size, config, mesh, seed)
    return run_decode(x, params, config, mesh, say)


def _progress(quiet: bool) -> Callable[[str], None]:
    """Lines on standard error with the seconds since the start; none from the other processes."""
    begin = time.perf_counter()

    def say(message: str) -> None:
        if not quiet:
            print(f"[{time.perf_counter() - begin:6.1f} s] {message}", file=sys.stderr, flush=True)

    return say


def _print_report(
    args: argparse.Namespace,
    workload: Workload,
    layers: Sequence[LayerTime],
    result: DecodeRun,
    fitted: Fit,
    devices: Devices,
) -> None:
    load = result.load
    print(f"\n{args.model}, batch {args.batch}, ep {args.ep}, {args.precision}")
    rows: list[list[Any]] = [
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
        ["dropped", f"{int(load.dropped)} of {workload.batch_size * workload.top_k} assignments"],
    ]
    print(format_table(["measured", ""], rows))
    print()
    print(_stages_table(result.stages))
    for layer in layers:
        print(f"\nmodelled: chip {layer.chip.name}, {layer.model} model, full width")
        print(layer_table(layer))
    if devices.is_virtual:
        print("\nThe wall time is that of virtual devices which share this machine's cores; it says nothing of a chip.")


def _stages_table(stages: StageTimes) -> str:
    milliseconds = {name: seconds * 1e3 for name, seconds in stages.seconds.items()}
    if not stages.by_kernels:
        return format_table(["stage, run by itself", "wall ms"], [[*item] for item in milliseconds.items()])
    rows: list[list[Any]] = []
    for name, time_ms in milliseconds.items():
        on_device = name in stages.by_kernels
        times: list[Any] = [None if on_device else time_ms, time_ms if on_device else None]
        apart = stages.overlaps.get(name)
        product = [apart.elapsed, apart.comp_elapsed, apart.dma_elapsed, apart.overlap] if apart else [None] * 4
        rows.append([name, *times, *product])
    headers = ["stage, run by itself", "wall ms", "kernels ms", "product µs", "comp µs", "dma µs", "overlap"]
    return format_table(headers, rows)


def _run_info(argv: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m bench.decode", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "moe_model": args.model,
        "jax": jax.__version__,
    }


def _measured(result: DecodeRun, fitted: Fit, devices: Devices) -> dict[str, Any]:
    load = result.load
    return {
        "devices": devices.note,
        "is_virtual": devices.is_virtual,
        "hidden_size": fitted.config.hidden_size,
        "intermediate_size": fitted.config.intermediate_size,
        "width_reduction": fitted.reduction,
        "wall_us": result.wall_seconds * 1e6,
        **_measured_stages(result.stages),
        "relative_error": result.relative_error,
        "checked_tokens": result.checked_tokens,
        "busiest_rows": result.busiest_rows,
        "tokens_per_expert": [int(n) for n in load.tokens_per_expert],
        "load_cv": float(load.cv),
        "load_entropy": float(load.entropy),
        "dropped": int(load.dropped),
    }


def _measured_stages(stages: StageTimes) -> dict[str, Any]:
    times: dict[str, Any] = {"stages_us": {name: seconds * 1e6 for name, seconds in stages.seconds.items()}}
    if stages.by_kernels:
        times["stages_clock"] = {name: "kernels" if name in stages.by_kernels else "wall" for name in stages.seconds}
        times["products_us"] = {name: apart and apart.record() for name, apart in stages.overlaps.items()}
    return times


if __name__ == "__main__":
    sys.exit(run(main))

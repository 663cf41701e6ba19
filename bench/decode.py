"""A decode step of an expert-parallel layer: run for real, checked against the dense oracle, and modelled."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax

from bench.command.parser import make_parser, run
from bench.command.values import natural_int, output_file, positive_float, positive_int, seed_number
from bench.expert_parallel.decode_step import TOLERANCE, DecodeRun, run_decode, tokens_of_text
from bench.expert_parallel.fit import fit
from bench.expert_parallel.report import measured_record, print_report
from bench.inputs.text import default_text_path, read_text
from bench.inputs.weights import make_params
from bench.measure.clock import Stopwatch
from bench.measure.devices import Devices, start
from bench.model.evaluation import build_evaluation
from bench.model.roofline import model_layer
from bench.model.workloads import moe_workload
from bench.record.json_files import write_json
from bench.record.provenance import command_line, now
from moejax import PRESETS, MoEConfig, get_preset
from moejax.config import PRECISIONS
from pallas_kernels.chips import CHIPS, chip_of, get_chip
from sharding.exchange.pick import TRANSPORTS
from sharding.mesh import make_mesh
from sharding.placement import Placement

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
        args.model,
        precision=args.precision,
        backend=args.backend,
        transport=args.transport,
        capacity_factor=args.capacity_factor,
    )
    Placement(config.num_experts, args.ep)  # raises where they do not fit
    if args.batch % args.ep:
        raise ValueError(
            f"--batch must be a multiple of --ep {args.ep}, got {args.batch}; try {-(-args.batch // args.ep) * args.ep}"
        )
    workload = moe_workload(config, batch_size=args.batch, ep=args.ep, precision=args.precision, rounding=args.rounding)
    chips = [get_chip(args.chip)]
    path = pathlib.Path(args.input) if args.input else default_text_path()
    text = read_text(path)

    devices = start(
        args.ep,
        say=_progress(quiet=False),
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
    )
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
        origin = {"command": command_line("bench.decode", argv), "date": now()}
        evaluation = build_evaluation(
            layers[0],
            run_info={**origin, "moe_model": args.model, "jax": jax.__version__},
            measured=measured_record(result, fitted, devices),
        )
        if args.json == "-":
            write_json(evaluation, "-")
        else:
            print(f"\n{args.model}, batch {args.batch}, ep {args.ep}, {args.precision}")
            print_report(workload, layers, result, fitted, devices)
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
    add = parser.add_argument
    add("--ep", type=positive_int, default=32, help="chips that share the experts (default 32)")
    add("--model", default="deepseek-v3", help=f"one of {', '.join(PRESETS)} (default deepseek-v3)")
    add("--batch", type=positive_int, default=1536, help="sequences in all, one token each (default 1536)")
    add(
        "--chip",
        default="seed",
        help=f"chip to model: {', '.join(CHIPS)}, or cores=64,tflops=768,gbps=8601.6 (default seed)",
    )
    add("--precision", default="w8a8", help=f"{' or '.join(PRECISIONS)} (default w8a8)")
    add("--input", metavar="FILE", help="text to route (default: one that comes with Python)")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        default="evaluation.json",
        help="file for the results (default evaluation.json), - for standard output only",
    )
    add("--capacity-factor", type=positive_float, help="drop what exceeds it (default: drop nothing)")
    add("--reduce", type=positive_int, metavar="N", help="divide the widths by N (default: as memory allows)")
    add("--backend", default="auto", help="auto, xla, pallas_tpu or pallas_gpu (default auto)")
    add("--transport", default="auto", help=f"one of auto, {', '.join(TRANSPORTS)} (default auto)")
    add("--rounding", default="round", help="activated experts: round (DS_TPU) or ceil (Tier6)")
    add("--seed", type=seed_number, default=0, help="of weights, embedding and places in the text (default 0)")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, for a run over several hosts")
    add("--num-processes", type=positive_int, metavar="N", help="processes in all")
    add("--process-id", type=natural_int, metavar="I", help="number of this process")
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
    watch = Stopwatch()

    def say(message: str) -> None:
        if not quiet:
            print(f"[{watch.seconds:6.1f} s] {message}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(run(main))

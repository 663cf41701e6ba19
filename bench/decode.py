"""A decode step: an expert-parallel layer run for real and checked; the layer and the whole model's step modelled."""

import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bench.command.parser import run
from bench.expert_parallel.decode_step import TOLERANCE, DecodeRun, run_decode, tokens_of_text
from bench.expert_parallel.fit import fit
from bench.expert_parallel.modelled import Modelled, show
from bench.expert_parallel.options import check_sizes, parse
from bench.expert_parallel.report import measured_record, print_report
from bench.inputs.text import default_text_path, read_text
from bench.inputs.weights import make_params
from bench.measure.clock import Stopwatch
from bench.measure.devices import Devices, start
from bench.model.decoders import get_decoder
from bench.model.evaluation import build_evaluation
from bench.model.times import model_layer, model_step
from bench.model.workloads import moe_workload
from bench.record.json_files import write_json
from bench.record.provenance import command_line, now
from moejax import MoEConfig, get_preset
from pallas_kernels.chips import Chip, chip_of, get_chip
from sharding.mesh import make_mesh


def main(argv: Sequence[str]) -> int:
    """Runs, checks, models and prints; returns 1 when the layer differs from the oracle."""
    args = parse(argv)

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names}

    # All that can be said without devices is checked before any of them starts.
    config = get_preset(args.model, **given("precision", "backend", "transport", "capacity_factor"))
    check_sizes(args, config)
    decoder = get_decoder(args.model)
    spread = given("ep", "dp", "q_len", "moe_tp", "precision", "rounding")
    workloads = [moe_workload(config, batch_size=batch, **spread) for batch in args.batch]
    chip = get_chip(args.chip)

    def model(chip: Chip) -> Modelled:
        """Under every cache length and batch."""
        pairs = itertools.product(args.kv_len, workloads)
        return [(model_layer(chip, workload), model_step(chip, workload, decoder, kv)) for kv, workload in pairs]

    whole = args.layers == "all"
    modelled = model(chip)
    origin = {"command": command_line("bench.decode", argv), "date": now(), "moe_model": args.model}
    title = f"{args.model}, ep {args.ep}, {args.precision}"
    if args.model_only:
        show(modelled, whole=whole, title=title, origin=origin, svg=args.svg, json=args.json)
        return 0
    (workload,) = workloads
    ((layer, step),) = modelled
    batch_size = workload.batch_size
    path = pathlib.Path(args.input) if args.input else default_text_path()
    text = read_text(path)

    devices = start(args.ep, say=_progress(quiet=False), **given("coordinator", "num_processes", "process_id"))
    say = _progress(quiet=jax.process_index() != 0)
    fitted = fit(config, devices, batch_size, args.reduce)
    say(f"devices: {devices.note}")
    say(f"layer:   {args.model}, {fitted.note}")
    say(f"text:    {batch_size} places of {path}")
    result = _run(fitted.config, devices, text, batch_size, args.seed, args.spare_slots, say)

    if jax.process_index() == 0:
        evaluation = build_evaluation(
            step if whole else layer,
            run_info={**origin, "jax": jax.__version__},
            measured=measured_record(result, fitted, devices),
        )
        if args.json == "-":
            write_json(evaluation, "-")
        else:
            print(f"\n{title}, batch {batch_size}")
            own = None if devices.is_virtual else chip_of(devices.devices[0])
            if own is not None and own != chip:
                modelled += model(own)
            print_report(workload, modelled, result, fitted, devices)
            write_json(evaluation, args.json)
            print(f"\nwrote {args.json}")
    if not result.relative_error < TOLERANCE:
        say(f"FAILED: the layer differs from the dense oracle by {result.relative_error:.1e}, limit {TOLERANCE:.0e}")
        return 1
    return 0


def _run(
    config: MoEConfig, devices: Devices, text, batch_size: int, seed: int, spare_slots: int, say: Callable[[str], None]
) -> DecodeRun:
    mesh = make_mesh(len(devices.devices), devices=devices.devices)
    say("making weights")
    params = jax.block_until_ready(make_params(config, mesh, seed))
    x = tokens_of_text(text, batch_size, config, mesh, seed)
    return run_decode(x, params, config, mesh, say, spare_slots=spare_slots)


def _progress(quiet: bool) -> Callable[[str], None]:
    """Lines on standard error with the seconds since the start; none from the other processes."""
    watch = Stopwatch()

    def say(message: str) -> None:
        if not quiet:
            print(f"[{watch.seconds:6.1f} s] {message}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(run(main))

"""The full-size layer compiled for a TPU slice on any machine: does it compile, does it fit, what is in it."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from bench.command.parser import make_parser, run
from bench.command.values import output_file, positive_int
from bench.model.shapes import operand_dtype
from bench.model.times import model_layer
from bench.model.workloads import moe_workload
from bench.record.json_files import write_json
from bench.record.progress import Progress
from bench.record.tables import Cell, format_table
from bench.tpu.aot_layer import LayerJob
from bench.tpu.libtpu import CompileError, require_libtpu, run_job
from bench.tpu.slices import as_ds_tpu, examples, parse_slice, slices_for
from bench.tpu.static_cycles import NOTE, kernel_cycles
from moejax import PRESETS
from moejax.config import PRECISIONS
from pallas_kernels.chips import GIB, MIB
from sharding.exchange.pick import on_one_axis

_WORKER = "bench.tpu.aot_layer"
_DECODE_BATCH, _TRAINING_BATCH = 48, 1024  # tokens a device
_SHOWN = 12

_EXAMPLES = (
    "--topology v6e:4x8 --model deepseek-v3 --ep 32",
    "--topology v6e:4x8 --model deepseek-v3 --ep 32 --precision w8a8 --precision w16a16 --grad",
    "--topology tpu7x:2x2x4 --model qwen3-235b-a22b --ep 16 --batch 4096 --json -",
    "--all --ep 32 --json aot.json",
)


def main(argv: Sequence[str]) -> int:
    """Compiles what is asked for, one process each, and prints it; returns 1 when something does not compile."""
    args = _parser().parse_args(argv)
    jobs = _jobs(args)
    require_libtpu()
    progress = Progress(len(jobs))
    records = []
    for done, job in enumerate(jobs):
        progress.show(done, f"compiling {_title(job)}")
        records.append(compile_record(job, with_cycles=not args.no_kernel_cycles))
        if args.json is not None and (args.json != "-" or len(records) == len(jobs)):
            write_json(records if len(jobs) > 1 else records[0], args.json)  # what is done stays if the rest is stopped
    progress.show(len(jobs), "done")
    if args.json != "-":
        print(_summary(records))
        if len(records) == 1 and records[0]["ok"]:
            print(_details(records[0]))
        print("\n" + _notes(records))
    failed = [record for record in records if not record["ok"]]
    for record in failed:
        print(f"error: {_title(LayerJob(**record['job']))}: {record['reason']}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.aot",
        "Compiles one expert-parallel MoE layer at full size for a TPU slice, with the TPU compiler and without a TPU, "
        "and shows what a device of the slice needs: HBM, VMEM, collectives, cycles, and modelled times beside them.",
        _EXAMPLES,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--topology", metavar="NAME", help=f"the slice: a TPU and a shape, such as {examples()}")
    what.add_argument(
        "--all",
        action="store_true",
        help="every kind of TPU, with the smallest slice of 32 devices or more that has ep",
    )
    add = parser.add_argument
    add("--model", default="deepseek-v3", help=f"one of {', '.join(PRESETS)} (default deepseek-v3)")
    add("--ep", type=positive_int, default=32, help="devices that share the experts (default 32)")
    add(
        "--precision",
        action="append",
        metavar="MODE",
        help=f"{' or '.join(PRECISIONS)}; give it again for both (default w8a8)",
    )
    add("--weights", choices=("fp8", "int8"), help="the 8 bits of w8a8 (default: what the TPU multiplies natively)")
    add("--grad", action="store_true", help="the gradients of a training step instead of a forward pass")
    add(
        "--batch",
        type=positive_int,
        help=f"tokens over the slice (default {_DECODE_BATCH} a device, with --grad {_TRAINING_BATCH})",
    )
    add("--backend", default="auto", help="auto, xla or pallas_tpu (default auto)")
    add("--transport", default="auto", help=f"what carries rows: auto, {', '.join(on_one_axis())} (default auto)")
    add("--reduce", type=positive_int, default=1, metavar="N", help="divide the widths by N (default 1)")
    add("--no-kernel-cycles", action="store_true", help="leave out the cycles of Pallas kernels, and their compiles")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write JSON to FILE, - for standard output: an object, for several compiles a list",
    )
    return parser


def _jobs(args: argparse.Namespace) -> list[LayerJob]:
    """What to compile, checked."""
    jobs = []
    for slice_ in slices_for(args.ep) if args.all else [parse_slice(args.topology)]:
        native = "fp8" if slice_.device.is_native("float8_e4m3fn") else "int8"
        batch = slice_.num_devices * (_TRAINING_BATCH if args.grad else _DECODE_BATCH)
        settings = {
            "topology": slice_.name,
            **{name: getattr(args, name) for name in ("model", "ep", "grad", "backend", "transport", "reduce")},
            "batch": batch if args.batch is None else args.batch,
            "weights": operand_dtype(args.weights or native).name,
        }
        jobs += [LayerJob(precision=precision, **settings) for precision in args.precision or ["w8a8"]]
    for job in jobs:
        job.config()
    return jobs


def compile_record(job: LayerJob, *, with_cycles: bool = True) -> dict[str, Any]:
    """Compiles one layer.

    Args:
      job: what to compile.
      with_cycles: compile each Pallas kernel once more, alone, for its cycles.

    Returns:
      What `bench.tpu.aot_layer.work` says, with "ok", modelled times, and the device's memories; sizes and times are
      those of one device. {"ok": False, "reason"} when it does not compile.
    """
    slice_, device = job.slice, job.slice.device
    record: dict[str, Any] = {
        "job": dataclasses.asdict(job),
        "chips": slice_.num_chips,
        "devices": slice_.num_devices,
        "dp": job.dp,
        "chip": slice_.chip.name,
    }
    layer = {"layer": record["job"]}
    try:
        compiled = run_job(_WORKER, layer)
    except CompileError as error:
        return {**record, "ok": False, "reason": str(error)}
    kernels = compiled["kernels"]
    if with_cycles and kernels:
        for kernel, cycles in zip(kernels, kernel_cycles(_WORKER, layer, len(kernels)), strict=True):
            kernel["cycles" if isinstance(cycles, int) else "no_cycles"] = cycles
    clock = slice_.clock_hz / 1e6
    for kernel in kernels:
        kernel["us"] = kernel["calls"] * kernel["cycles"] / clock if "cycles" in kernel else None
    for row in compiled["xla_operations"]:
        row["us"] = row["cycles"] / clock
    workload = moe_workload(
        job.config(),
        batch_size=job.batch // job.dp,
        ep=job.ep,
        precision=job.precision,
        quantized_dtype="int8" if job.weights == "int8" else "fp8",
    )
    return {
        **record,
        "ok": True,
        **compiled,
        "hbm_bytes": int(device.hbm_bytes),
        "fits_hbm": compiled["memory"]["peak_bytes"] <= device.hbm_bytes,
        "vmem_capacity_bytes": device.fast_memory_bytes,
        "clock_hz": slice_.clock_hz,
        "kernels_us": sum(kernel["us"] or 0 for kernel in kernels),
        "xla_us": compiled["xla_cycles"] / clock,
        "roofline_us": model_layer(device, workload, grad=job.grad).elapsed,
        "ds_tpu_us": model_layer(as_ds_tpu(device, workload.dtype), workload, grad=job.grad).elapsed,
    }


def _title(job: LayerJob) -> str:
    return f"{job.topology} {job.model} ep {job.ep} {job.precision} {'training step' if job.grad else 'forward'}"


def _summary(records: Sequence[dict[str, Any]]) -> str:
    headers = ["topology", "precision", "pass", "compiles", "s", "HBM GiB", "of", "VMEM MiB", "of", "collectives MB"]
    headers += ["kernels µs", "XLA µs", "roofline µs", "DS_TPU µs"]
    rows: list[list[Cell]] = []
    for record in records:
        job = record["job"]
        head: list[Cell] = [job["topology"], job["precision"], "training" if job["grad"] else "forward"]
        if not record["ok"]:
            rows.append([*head, "no", *[None] * (len(headers) - 4)])
            continue
        hbm = record["memory"]["peak_bytes"] / GIB, record["hbm_bytes"] / GIB
        vmem = record["vmem_bytes"] / MIB, record["vmem_capacity_bytes"] / MIB
        sent = sum(collectives["bytes"] for collectives in record["collectives"]) / 1e6
        times = [record[name] for name in ("kernels_us", "xla_us", "roofline_us", "ds_tpu_us")]
        fits = "yes" if record["fits_hbm"] else "too large"
        rows.append([*head, fits, record["compile_s"], *hbm, *vmem, sent, *times])
    return format_table(headers, rows)


def _details(record: dict[str, Any]) -> str:
    bytes_per_us = LayerJob(**record["job"]).slice.device.hbm_bandwidth / 1e6
    kernels: list[list[Cell]] = []
    for kernel in record["kernels"]:
        moved = kernel["hbm_bytes"]
        moved_us = None if moved is None else kernel["calls"] * moved / bytes_per_us
        figures = kernel.get("cycles"), kernel["us"], moved_us
        kernels.append([kernel["name"], kernel["calls"], *figures, kernel.get("no_cycles", "")])
    tables = {
        ("HBM of a device", "bytes"): [[key.removesuffix("_bytes"), size] for key, size in record["memory"].items()],
        ("collective", "count", "bytes"): [list(each.values()) for each in record["collectives"]],
        ("Pallas kernel", "calls", "cycles of one", "µs", "its bytes, µs", ""): kernels,
        ("XLA operations", "calls", "cycles", "µs"): [list(row.values()) for row in record["xla_operations"][:_SHOWN]],
    }
    shown = [format_table(headers, rows) for headers, rows in tables.items() if rows or headers[0] != "Pallas kernel"]
    return "\n" + "\n\n".join(shown)


def _notes(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"Kernels: {NOTE}.",
        "XLA: the compiler's guess for its own operations, collectives left out. Roofline and DS_TPU: modelled.",
        "Sizes and times are those of one device; v7x shows two devices a chip. None of this is measured.",
    ]
    made = [record for record in records if record["ok"]]
    if any(record["has_dynamic_loops"] for record in made):
        lines.append("A loop whose trips only the data tell counts once, later rounds of an exchange count nothing.")
    lines += sorted({note for record in made for note in record["notes"]})
    if made:
        versions = made[0]["versions"]
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))

"""Our GPU kernels beside their peers on the same inputs in one run, each with a bar to reach."""

import argparse
import dataclasses
import gc
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from bench.command.parser import make_parser, run
from bench.command.values import NAMES, output_file
from bench.hopper.cases import CASES, Case, select_cases
from bench.hopper.ceilings import Ceilings, measure_ceilings
from bench.hopper.measure_case import case_record, measure_case
from bench.hopper.table import ceilings_line, failures, peer_problems, table, time_text
from bench.measure.clock import require_nvidia_gpu
from bench.measure.devices import known_chip
from bench.measure.errors import describe
from bench.record.json_files import write_json
from bench.record.progress import Progress
from bench.record.provenance import provenance
from pallas_kernels.chips import Chip

_REPEATS = 10
_QUICK_REPEATS = 3
_PACKAGES = ("jax", "jaxlib", "torch", "tokamax", "numpy")


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and returns 1 when a case of ours fails or misses its bar."""
    args = _parser().parse_args(argv)
    cases = select_cases(args.cases)
    # Torch needs a share of the memory; jax reads this when it first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    require_nvidia_gpu()
    device = jax.devices()[0]
    chip = known_chip(device)
    progress = Progress(len(cases))
    repeats = _QUICK_REPEATS if args.quick else _REPEATS
    ceilings = measure_ceilings(repeats)
    record = make_record(device.device_kind, argv, args.commit, ceilings)
    progress.say(f"{device.device_kind}: {ceilings_line(record)}")
    for number, case in enumerate(cases, 1):
        record["cases"][case.name] = _run(case, chip, ceilings, repeats, with_peers=not (args.no_peers or args.quick))
        summary = _summary(case, record["cases"][case.name])
        progress.say(f"[{number}/{len(cases)}, {progress.seconds:.0f} s] {summary}")
        if args.json not in (None, "-"):  # after each, so that a crash of the driver leaves those before it
            write_json(record, args.json)

    if args.json == "-":
        write_json(record, "-")
    else:
        print(f"{record['chip']}, driver {record['driver']}, commit {record['commit']}; {ceilings_line(record)}")
        print(table(record, markdown=args.md))
    for line in peer_problems(record):
        progress.say(f"no figures of {line}")
    failed = failures(record)
    for line in failed:
        progress.say(f"FAILED: {line}")
    return 1 if failed else 0


def make_record(chip: str, argv: Sequence[str], commit: str | None, ceilings: Ceilings) -> dict[str, Any]:
    """The JSON object of a run, without cases yet."""
    return {
        "what": "device time of grouped products, ours and what else is installed, on the same inputs in one run",
        **provenance("bench.gpu", argv, chip, _PACKAGES, commit),
        "ceilings": dataclasses.asdict(ceilings),
        "cases": {},
    }


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.gpu",
        "Times our grouped products on an NVIDIA GPU, and those of other libraries that are installed, by the device "
        "time of their kernels. Each result is checked first. The exit status is 1 if one of ours fails or misses its "
        f"bar. Cases: {', '.join(CASES)}.",
        ("--json docs/results/h200.json", "--cases decode-fp8,down-fp8 --quick", "--no-peers --md"),
    )
    add = parser.add_argument
    add("--cases", type=NAMES, metavar="NAME,...", help="measure these only (default: all)")
    add("--no-peers", action="store_true", help="ours only")
    add("--quick", action="store_true", help=f"ours only, {_QUICK_REPEATS} repeats instead of {_REPEATS}")
    add("--json", type=output_file, metavar="PATH", help="write the record to PATH, - for standard output only")
    add("--md", action="store_true", help="print the table as Markdown")
    add("--commit", help="the commit to record (default: what git says)")
    return parser


def _run(case: Case, chip: Chip, ceilings: Ceilings, repeats: int, with_peers: bool) -> dict[str, Any]:
    try:
        ours, peers = measure_case(case, repeats=repeats, with_peers=with_peers)
    except Exception as error:  # inputs that do not fit into memory, say; the other cases still count
        ours, peers = {"error": describe(error)}, {}
    # Each case needs most of the memory at times.
    jax.clear_caches()
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    return case_record(case, ours, peers, chip, ceilings)


def _summary(case: Case, record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{case.name}: {record['error']}"
    others = [f"{name} {peer['us']:.1f}" for name, peer in record["peers"].items() if "us" in peer]
    return f"{case.name}: {time_text(record)} µs; " + (", ".join(others) or "no peers")


if __name__ == "__main__":
    sys.exit(run(main))

"""Decoder blocks, whole sequences and decode steps: ours, the same in plain JAX, and torch's, in one run."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from bench.blocks.cases import CASES, Case, select_cases
from bench.blocks.measure import measure_case
from bench.blocks.table import absences, failures, table
from bench.command.parser import make_parser, run
from bench.command.values import NAMES, output_file
from bench.measure.clock import MAX_COPIES
from bench.measure.errors import describe
from bench.record.json_files import write_json
from bench.record.progress import Progress
from bench.record.provenance import chip_name, provenance
from moejax.config import PRECISIONS

_ROUNDS = 10
_QUICK_ROUNDS = 2
_PACKAGES = ("jax", "jaxlib", "flax", "torch")


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and returns 1 when one of ours fails or is wrong."""
    args = _parser().parse_args(argv)
    cases = select_cases(args.cases, args.precision, reduce=args.quick)
    # Torch needs a share of the memory; jax reads this when it first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    record: dict[str, Any] = {
        "what": "wall time of a decoder block, the contenders in turns on the same inputs in one run",
        **provenance("bench.decoder", argv, chip_name(), _PACKAGES, args.commit),
        "precision": args.precision,
        "reduced": args.quick,
        "cases": {},
    }
    settings = {"rounds": _QUICK_ROUNDS, "at_most": 1} if args.quick else {"rounds": _ROUNDS, "at_most": MAX_COPIES}
    progress = Progress(len(cases))
    for number, (name, case) in enumerate(cases.items(), 1):
        record["cases"][name] = _run(case, **settings, with_torch=not args.no_torch)
        progress.say(f"[{number}/{len(cases)}, {progress.seconds:.0f} s] {name}")
        if args.json not in (None, "-"):  # after each, so that a crash of the driver leaves those before it
            write_json(record, args.json)
    if args.json == "-":
        write_json(record, "-")
    else:
        print(f"{record['chip']}, driver {record['driver']}, commit {record['commit']}")
        if args.quick:
            print("sizes are reduced: times mean nothing")
        print(table(record))
    for line in absences(record):
        progress.say(f"no figures of {line}")
    failed = failures(record)
    for line in failed:
        progress.say(f"FAILED: {line}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.decoder",
        "Times decoder blocks (attention, and experts or a dense gated network) over whole sequences, and decode steps "
        "with a cache: ours, the same in plain JAX, and torch's, eager and compiled, where torch is installed. "
        "Every result is checked first. Times are wall times of a block in a row of blocks with weights of their own. "
        "A shape is sequences × tokens × hidden size × heads × width of the network, '·' experts; kv is what a cache "
        f"holds before a step. The exit status is 1 if one of ours fails. Cases: {', '.join(CASES)}.",
        (
            "--json blocks.json",
            "--cases tiny,bert-base,wide-8x128",
            "--cases decode-qwen3-30b-a3b-8 --precision w8a8 --no-torch",
            "--quick",
        ),
    )
    add = parser.add_argument
    add("--cases", type=NAMES, metavar="NAME,...", help="measure these only (default: all)")
    add(
        "--precision",
        default="w16a16",
        choices=tuple(PRECISIONS),
        help="of experts; a dense network is in 16 bits (default: %(default)s)",
    )
    add("--no-torch", action="store_true", help="ours and plain JAX only")
    add("--quick", action="store_true", help="small sizes and few rounds, for any machine: shows that everything runs")
    add("--json", type=output_file, metavar="PATH", help="write the record to PATH, - for standard output only")
    add("--commit", help="the commit to record (default: what git says)")
    return parser


def _run(case: Case, **settings: Any) -> dict[str, Any]:
    try:
        return measure_case(case, **settings)
    except Exception as error:  # inputs that do not fit into memory, say; the other cases still count
        return {"shape": case.shape, "error": describe(error)}
    finally:
        jax.clear_caches()  # each case needs most of the memory at times
        gc.collect()


if __name__ == "__main__":
    sys.exit(run(main))

"""Static cycles of our grouped products beside the peers', compiled for each TPU in one run."""

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.cli import make_parser, run
from bench.cycles_cases import Case, all_cases, implementations
from bench.libtpu import CompileError, require_libtpu, run_job
from bench.peers import package_version
from bench.progress import Progress
from bench.provenance import current_commit
from bench.report import Cell, format_table, write_json
from bench.roofline import roofline_gemm
from bench.static_cycles import NOTE, kernel_cycles
from bench.tpu_slices import GENERATIONS, parse_slice

_WORKER = "bench.cycles_worker"
_SMALLEST = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
_PACKAGES = ("jax", "jaxlib", "libtpu", "tokamax")


def main(argv: Sequence[str]) -> None:
    """Compiles every case for every TPU that is asked for and shows the cycles."""
    parser = make_parser(
        "bench.cycles",
        "Compiles grouped matrix products for TPUs without a TPU, ours and those of megablox (in jax) and tokamax (if "
        "installed), and compares the cycles that the compiler counts in each kernel.",
        (
            "",
            "--chip v6e --case deepseek --json -",
            "--chip v5e --chip tpu7x --case 'decode down'",
            "--json docs/results/tpu_cycles.json",
        ),
    )
    parser.add_argument("--chip", action="append", choices=tuple(GENERATIONS), help="a TPU; again for more (all)")
    parser.add_argument("--case", default="", metavar="WORDS", help="only cases whose names have all these words")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE, - for standard output only")
    args = parser.parse_args(argv)

    cases = [case for case in all_cases() if all(word in case.name for word in args.case.split())]
    if not cases:
        raise ValueError(f"no case has the words {args.case!r}; there are {', '.join(c.name for c in all_cases())}")
    require_libtpu()
    chips = args.chip or list(GENERATIONS)
    progress = Progress(len(cases) * len(chips))
    records: list[dict[str, Any]] = []
    for chip in chips:
        for case in cases:
            progress.show(len(records), f"{chip} {case.name}")
            records.append(case_record(case, chip))
    progress.show(len(records), "done")
    if args.json is not None:
        write_json(
            {
                "command": shlex.join(["python", "-m", "bench.cycles", *argv]),
                "note": NOTE,
                "versions": {package: package_version(package) for package in _PACKAGES},
                "commit": current_commit(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "cases": records,
            },
            args.json,
        )
    if args.json != "-":
        print(table(records))
        print(f"\nCycles of one call: {NOTE}; these are marked ~. Floor: of bytes and arithmetic, at the chip's clock.")


def case_record(case: Case, chip: str) -> dict[str, Any]:
    """The cycles of one case on one TPU, by implementation; of several configurations the best."""
    topology = f"{chip}:{_SMALLEST[chip]}"
    slice_ = parse_slice(topology)
    floor_us = roofline_gemm(slice_.device, case.shape, "bf16").elapsed
    measured = {name: _cycles(case, name, topology) for name in implementations(case)}
    return {
        "chip": chip,
        "case": case.name,
        "shape": dataclasses.asdict(case.shape),
        "floor_cycles": round(floor_us * slice_.generation.clock_hz / 1e6),
        "implementations": measured,
    }


def _cycles(case: Case, implementation: str, topology: str) -> dict[str, Any]:
    job = {"case": dataclasses.asdict(case), "implementation": implementation, "topology": topology}
    try:
        found = run_job(_WORKER, job)
    except CompileError as error:
        return {"reason": str(error)}
    kernels = found["kernels"]
    totals: dict[str, int] = {}
    reasons: dict[str, str] = dict(found["reasons"])
    for kernel, cycles in zip(kernels, kernel_cycles(_WORKER, job, len(kernels)), strict=True):
        name = kernel["configuration"]
        if isinstance(cycles, int):
            totals[name] = totals.get(name, 0) + kernel["calls"] * cycles
        else:
            reasons[name] = cycles
    whole = {name: total for name, total in totals.items() if name not in reasons}
    if not whole:
        return {"reason": next(iter(reasons.values()), "it has no Pallas kernel")}
    best = min(whole, key=whole.__getitem__)
    guesses = [kernel["is_guess"] for kernel in kernels if kernel["configuration"] == best]
    return {"cycles": whole[best], "configuration": best, "is_guess": any(guesses)}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line a case and chip, one column an implementation."""
    names = list(dict.fromkeys(name for record in records for name in record["implementations"]))
    rows: list[list[Cell]] = []
    for record in records:
        shape = ",".join(str(record["shape"][dim]) for dim in "GMKN")
        cells = [_cell(record["implementations"].get(name)) for name in names]
        rows.append([record["chip"], record["case"], shape, record["floor_cycles"], *cells])
    return format_table(["chip", "case", "G,M,K,N", "floor", *names], rows)


def _cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    if "cycles" not in measured:
        return "no: " + measured["reason"][:40]
    return f"{'~' if measured['is_guess'] else ''}{measured['cycles']:,}"


if __name__ == "__main__":
    sys.exit(run(main))

"""Static cycles of our grouped products beside the peers', compiled for each TPU in one run."""

import concurrent.futures
import dataclasses
import itertools
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command.parser import make_parser, run
from bench.command.values import output_file, positive_int
from bench.model.roofline import roofline_gemm
from bench.record.json_files import read_json, write_json
from bench.record.progress import Progress
from bench.record.provenance import command_line, current_commit, now, package_version
from bench.tpu.cycles_cases import ACTIVATION, GUESSED, KINDS, Case, Choice, all_cases, choices, copied_bytes
from bench.tpu.cycles_table import table
from bench.tpu.libtpu import require_libtpu
from bench.tpu.slices import GENERATIONS, Slice, parse_slice
from bench.tpu.static_cycles import kernel_cycles

_WORKER = "bench.tpu.cycles_worker"
_SMALLEST = {"v6e": "2x2", "tpu7x": "2x2x1", "v5e": "2x2", "v5p": "2x2x1"}
_PACKAGES = ("jax", "jaxlib", "libtpu", "tokamax")
_TIMEOUT = 1200  # seconds for one program
NOTE = (
    "Each kernel is compiled as its static twin, which writes the group sizes into scalar memory itself, so that the "
    "compiler's estimate follows its loops as they would run. The estimate gives each semaphore a memory of its own, "
    "of a fixed rate and latency: copies that signal one semaphore follow each other, those of several run at once. "
    "Waits so tell how many semaphores a kernel has, not how busy HBM is, and a kernel can come out below the floor: "
    "the larger of arithmetic at the peak and of the least bytes at HBM's bandwidth. Instructions: the same kernel "
    "without copies and without waits for them. Nothing was run on a TPU."
)


def main(argv: Sequence[str]) -> None:
    """Compiles every case for every TPU that is asked for and shows the cycles."""
    parser = make_parser(
        "bench.cycles",
        "Compiles grouped matrix products for TPUs without a TPU, ours and those of megablox (in jax) and tokamax (if "
        "installed: pip install -e '.[aot,peers-tpu]'), and compares the cycles that the compiler estimates for each "
        "kernel. With --json FILE, what an interrupted run has found is kept there and not compiled again.",
        (
            "",
            "--chip v6e --case deepseek --json -",
            "--chip v5e --chip tpu7x --case 'decode down'",
            "--json docs/results/tpu_cycles.json",
        ),
    )
    add = parser.add_argument
    add("--chip", action="append", choices=tuple(GENERATIONS), help="a TPU; again for more (all)")
    add("--case", default="", metavar="WORDS", help="only cases whose names have all these words")
    add("--json", type=output_file, metavar="FILE", help="write JSON to FILE, - for standard output only")
    add("--jobs", type=positive_int, default=2, help="programs to compile at once (default: %(default)s)")
    add("--timeout", type=positive_int, default=_TIMEOUT, help="seconds for one program (default: %(default)s)")
    add("--anew", action="store_true", help="keep nothing of what FILE holds")
    args = parser.parse_args(argv)

    cases = [case for case in all_cases() if all(word in case.name for word in args.case.split())]
    if not cases:
        raise ValueError(f"no case has the words {args.case!r}; there are {', '.join(c.name for c in all_cases())}")
    require_libtpu()
    record: dict[str, Any] = {
        "command": command_line("bench.cycles", argv),
        "note": NOTE,
        "versions": {package: package_version(package) for package in _PACKAGES},
        "commit": current_commit(),
        "date": now(),
        "rows": [],
    }
    path = None if args.json in (None, "-") else Path(args.json)
    if path is not None and path.exists() and not args.anew:
        record = _resumed(
            record, read_json(path, {"rows": [{"chip": str, "case": str, **{kind: {str: [{}]} for kind in KINDS}}]})
        )
    chips = args.chip or list(_SMALLEST)
    measure(record, [(chip, case) for case in cases for chip in chips], path, args.jobs, args.timeout)
    if args.json == "-":
        write_json(record, "-")
    else:
        print(table(record["rows"]))
        print(f"\n{NOTE}")


def _resumed(record: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """`record` with the rows of an earlier run, if that was of the same programs."""
    commits = [str(part.get("commit")).removesuffix("+dirty") for part in (record, found)]
    return found if found.get("versions") == record["versions"] and commits[0] == commits[1] else record


def measure(
    record: dict[str, Any], wanted: Sequence[tuple[str, Case]], path: Path | None, jobs: int, timeout: float
) -> None:
    """Adds what is `wanted` and not there yet to `record`, and writes that to `path` after every program."""
    rows = {(row["chip"], row["case"]): row for row in record["rows"]}
    tasks = []
    for chip, case in wanted:
        row = rows.setdefault((chip, case.name), new_row(chip, case) | {"commit": record["commit"]})
        for kind in KINDS:
            named = choices(case, kind).items()
            tasks += [(row, case, kind, name, options) for name, options in named if name not in row[kind]]
    progress, done, lock = Progress(len(tasks)), itertools.count(1), threading.Lock()

    def fill(row: dict[str, Any], case: Case, kind: str, name: str, options: Sequence[Choice]) -> None:
        found = figures(row["chip"], case, kind, options, timeout)
        with lock:
            row[kind][name] = found
            if row not in record["rows"]:
                record["rows"].append(row)
            if path is not None:
                write_json(record, str(path))
            progress.show(next(done), f"{row['chip']} {case.name}, {kind}: {name}")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(fill, *task) for task in tasks]):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def new_row(chip: str, case: Case) -> dict[str, Any]:
    """A case on a TPU, with its floors in cycles and no implementation yet."""
    slice_ = _slice(chip)
    floor = roofline_gemm(slice_.device, case.shape, "bf16")
    clock = slice_.clock_hz / 1e6
    return {
        "chip": chip,
        "case": case.name,
        "shape": dataclasses.asdict(case.shape),
        "arithmetic_cycles": round(floor.comp_elapsed * clock),
        "floor_cycles": round(floor.elapsed * clock),
        **{kind: {} for kind in KINDS},
    }


def figures(chip: str, case: Case, kind: str, options: Sequence[Choice], timeout: float) -> list[dict[str, Any]]:
    """The cycles of an implementation's first choice that compiles, after the reasons why others have none."""
    found: list[dict[str, Any]] = []
    for choice in options:
        found.append(figure(chip, case, kind, choice, timeout))
        if "cycles" in found[-1]:
            break
    return found


def figure(chip: str, case: Case, kind: str, choice: Choice, timeout: float = _TIMEOUT) -> dict[str, Any]:
    """The cycles of one choice, or the reason why there are none; beside them those that its copies take."""
    slice_ = _slice(chip)
    answer: dict[str, Any] = {"configuration": choice.configuration}
    copied = copied_bytes(choice, case)
    if copied is not None:
        answer["copy_cycles"] = round(copied / slice_.device.hbm_bandwidth * slice_.clock_hz)
    job = {"case": dataclasses.asdict(case), "choice": dataclasses.asdict(choice), "kind": kind}
    is_kernel = choice.implementation != ACTIVATION
    (cycles,) = kernel_cycles(_WORKER, {**job, "topology": slice_.name}, 1, timeout, total=not is_kernel)
    if isinstance(cycles, str):
        return {**answer, "reason": _short(cycles)}
    if is_kernel and cycles < new_row(chip, case)["arithmetic_cycles"]:
        return {**answer, "reason": GUESSED}
    return {**answer, "cycles": cycles}


def _slice(chip: str) -> Slice:
    return parse_slice(f"{chip}:{_SMALLEST[chip]}")


def _short(reason: str) -> str:
    """The compiler's reason in few words."""
    if re.search(r"memory space vmem|RESOURCE_EXHAUSTED.*vmem", reason):
        return "needs more VMEM than there is"
    return re.sub(r"^\S*Error: ", "", reason)[:120]


if __name__ == "__main__":
    sys.exit(run(main))

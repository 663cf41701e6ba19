"""What the command lines of topk, permute, layer and sweep share: options, the run, the table."""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.command import values
from bench.command.parser import make_parser
from bench.command.values import NAMES, POSITIVE_FLOATS, POSITIVE_INTS, positive_float, positive_int
from bench.measure.steps import StepTimer
from bench.one_chip.cases import DTYPES, LOADS, Bench, Case
from bench.one_chip.layouts import LAYOUTS
from bench.one_chip.records import Record, origin_of
from bench.one_chip.run_cases import Outcome, RunCase, run_cases
from bench.processes.side_by_side import my_turns
from bench.processes.turns import Turns
from bench.record.files import holding
from bench.record.json_files import write_json
from bench.record.progress import Progress
from bench.record.tables import Cell, format_table

_COMMON = ("zipf_exponent", "text", "dtype", "seed", "block", "backend", "with_xla")
"""Options that are fields of every case."""


def _pair(text: str) -> tuple[int, int]:
    batch, cross, length = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"must be pairs such as 32x128,64x256, got {text!r}")
    return positive_int(batch), positive_int(length)


def main_of(
    bench: Bench,
    description: str,
    examples: Sequence[str],
    run_case: RunCase,
    argv: Sequence[str],
    defaults: Mapping[str, Any],
) -> int:
    """The command line of one bench: all combinations of the sizes that are given.

    `defaults` are those in which the benches differ, by the names of fields of a `Case`. The exit status is 1 if a case
    failed or gave a wrong result.
    """
    parser = make_parser(f"bench.{bench}", description, examples)
    _add_size_options(parser, bench)
    add_run_options(parser)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    cases = combinations(bench, args)
    with holding(args.out) if args.out else contextlib.nullcontext():
        return finish(args, run(bench, argv, args, cases, run_case))


def _add_size_options(parser: argparse.ArgumentParser, bench: Bench) -> None:
    """Options that make cases; several values each give all combinations."""
    add = parser.add_argument
    sizes: dict[str, Any] = {"type": POSITIVE_INTS, "metavar": "N,..."}
    add("--tokens", **sizes, help="tokens (default %(default)s)")
    add(
        "--batch-length",
        type=values.several(_pair),
        metavar="BxL,...",
        help="tokens as sequences x length, in place of --tokens",
    )
    add("--hidden", **sizes, help="width of a token (default %(default)s)")
    add("--experts", **sizes, default="32", help="experts (default %(default)s)")
    add("--k", **sizes, default="2", help="experts a token picks (default %(default)s)")
    add(
        "--capacity",
        type=POSITIVE_FLOATS,
        metavar="F,...",
        default="1.25",
        help="capacity factors: rows of an expert over the mean, in the padded layout (default %(default)s)",
    )
    add("--load", type=NAMES, metavar="NAME,...", default="balanced", help=f"{', '.join(LOADS)} (default balanced)")
    add_load_options(parser)
    add("--dtype", help=f"{', '.join(DTYPES)} (default %(default)s)")
    add("--seed", type=values.seed_number, default=0, help="of all that is random (default 0)")
    if bench != "topk":
        add(
            "--layout",
            dest="layouts",
            type=NAMES,
            metavar="NAME,...",
            default="compact",
            help=f"some of {', '.join(LAYOUTS)}; the first is what the others are compared with (default %(default)s)",
        )
        add("--block", type=positive_int, default=128, help="rows of a block, block_sparse (default 128)")
    if bench == "layer":
        add("--intermediate", type=positive_int, help="width of an expert (default: half of --hidden)")
        add("--no-split", action="store_true", help="time the whole layer only")
    add("--backend", default="auto", help="auto, xla, pallas_tpu or pallas_gpu (default auto)")
    add(
        "--xla",
        dest="with_xla",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also time the plain XLA variant, in pairs with ours",
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Options on what the loads of `bench.one_chip.loads` are made of."""
    add = parser.add_argument
    add(
        "--zipf",
        dest="zipf_exponent",
        type=values.natural_float,
        default=1.0,
        metavar="S",
        help="exponent of the load zipf (default 1)",
    )
    add("--text", metavar="FILE", help="text of the load text (default: one that Python carries)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options on how cases are run, and what becomes of the records."""
    add = parser.add_argument
    add(
        "--repeats",
        type=values.whole_number(2),  # as one measurement has no spread
        default=10,
        help="of each measurement (default %(default)s)",
    )
    add(
        "--minutes",
        type=positive_float,
        default=float("inf"),
        metavar="N",
        help="begin no case that would end after N minutes",
    )
    add(
        "--out",
        type=values.output_folder,
        metavar="DIR",
        help="append records to a file in DIR, and skip the cases that it already has",
    )
    add(
        "--json",
        type=values.output_file,
        metavar="PATH",
        help="write the records to PATH as one list, - for standard output",
    )
    add("--commit", help="the commit to record (default: what git says)")


def combinations(bench: Bench, args: argparse.Namespace) -> list[Case]:
    """The cases that the options of `_add_size_options` ask for."""
    places: list[dict[str, Any]] = [{"tokens": tokens} for tokens in args.tokens]
    if args.batch_length is not None:
        places = [{"tokens": batch * length, "batch": batch, "length": length} for batch, length in args.batch_length]
    common = {name: getattr(args, name) for name in _COMMON if name in args}
    if "layouts" in args:
        common["layouts"] = layouts = tuple(args.layouts)
        common["split"] = () if bench == "layer" and args.no_split else layouts
    # Loads vary fastest, as the programs that they run are the same.
    grid = itertools.product(places, args.hidden, args.experts, args.k, args.capacity, args.load)
    return [
        Case(
            bench=bench,
            hidden=hidden,
            intermediate=(args.intermediate or hidden // 2) if bench == "layer" else 0,
            experts=experts,
            k=k,
            capacity_factor=capacity,
            load=load,
            **place,
            **common,
        )
        for place, hidden, experts, k, capacity, load in grid
    ]


def run(
    command: str, argv: Sequence[str], args: argparse.Namespace, cases: Sequence[Case], run_case: RunCase
) -> Outcome:
    """Runs the cases as the options of `add_run_options` say; the file of records is called after the command."""
    progress = Progress(len(cases))
    clock = StepTimer(turns=my_turns(args.out) if args.out else Turns())
    origin = origin_of(f"bench.{command}", argv, args.commit)
    where = "device time of kernels" if clock.name == "kernels" else "wall time"
    progress.say(f"{origin['chip']}: {where}, {args.repeats} repeats, {len(cases)} cases")
    path = args.out / f"{command}.jsonl" if args.out else None
    return run_cases(
        cases, run_case, clock, origin, path=path, repeats=args.repeats, progress=progress, minutes=args.minutes
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> int:
    """Prints and writes what came of the cases; returns the exit status."""
    if args.json is not None:
        write_json(outcome.records, args.json)
    measured = [record for record in outcome.records if record["error"] is None]
    if measured and args.json != "-":
        print(table(measured))
    if outcome.num_left:
        print(f"{outcome.num_left} cases left: run the command again", file=sys.stderr)
    for line in outcome.failures:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if outcome.failures else 0


_HEADERS = (
    *("operator", "layout", "backend", "T,H,E,K", "load", "µs", "± µs", "p95 µs", "TFLOP/s", "bw_32k", "bw_strict"),
    *("routing", "dropped", "against"),
)


def table(records: Sequence[Record]) -> str:
    """Records for people: mean times with half of their confidence intervals, rates, and the comparisons."""
    rows: list[list[Cell]] = []
    for r in records:
        half = (r["ci95_us"][1] - r["ci95_us"][0]) / 2
        shape = ",".join(str(r[name]) for name in ("tokens", "hidden", "experts", "k"))
        what = [r["operator"], r["layout"] or "", r["backend"], shape, r["load"]]
        times = [r["mean_us"], half, r["p95_us"]]
        rates = [r["tflops"], r["bw_32k"], r["bw_strict"]]
        rest = [_share(r["routing_share"]), _share(r["drop_rate"]), _comparison(r["paired"])]
        rows.append([*what, *times, *rates, *rest])
    return format_table(_HEADERS, rows)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _comparison(paired: Record | None) -> str:
    if paired is None:
        return ""
    low, high = paired["ci95_us"]
    other = "/".join(part for part in (paired["layout"], paired["backend"]) if part)
    return f"{other}: {paired['ratio']:.3f}×, {paired['difference_us']:+.1f} µs [{low:+.1f}, {high:+.1f}]"

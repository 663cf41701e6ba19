"""Top-k, permute and layer over grids of sizes and loads: --out DIR writes DIR/sweep.jsonl.

Records are written case by case, and a sweep that is started again goes on where it stopped; at its end it makes the
report of all that is in DIR (`bench.plot`). `bench.one_chip.records` lists their fields, `bench.one_chip.sweep_grid`
the grids.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence

import bench.layer
import bench.permute
import bench.topk
from bench.command.parser import make_parser
from bench.command.parser import run as run_command
from bench.command.values import NAMES, POSITIVE_INTS, positive_int
from bench.measure.steps import StepTimer
from bench.one_chip.cases import BENCHES, Case
from bench.one_chip.options import add_load_options, add_run_options, finish, run
from bench.one_chip.records import Record
from bench.one_chip.sweep_grid import full_grid, quick_grid
from bench.plot import say_report
from bench.processes.side_by_side import Share, my_share, prepare_jobs, run_side_by_side
from bench.record.files import holding

_EXAMPLES = (
    "--quick --out results",
    "--out results",
    "--out results --minutes 9   (and again, until no cases are left)",
    "--out results --jobs 12   (on a machine with one GPU and many cores)",
    "--out results --bench permute --tokens 8192 --experts 32,64,128",
)

_NO_TIME = 1e-9

_RUN_CASE = {"topk": bench.topk.run_case, "permute": bench.permute.run_case, "layer": bench.layer.run_case}


def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints; returns 1 when a case failed or gave a wrong result."""
    args = _parser().parse_args(argv)
    if args.out is None and not args.list:
        raise ValueError("--out DIR is needed: a sweep is long, and goes on from what is in its file")
    cases = _select(quick_grid() if args.quick else full_grid(), args)
    if args.list:
        for case in cases:
            print(case.key)
        return 0
    prepare_jobs(args.jobs)
    if (share := my_share()) is not None:
        return 1 if run("sweep", argv, args, share_of(cases, share), _run_case).failures else 0
    failed = False
    with holding(args.out):
        if args.jobs > 1:
            failed = any(run_side_by_side("bench.sweep", argv, args.jobs, args.out))
            args.minutes = _NO_TIME  # only reads what they wrote
        failed = finish(args, run("sweep", argv, args, cases, _run_case)) != 0 or failed
        say_report(args.out)
    return 1 if failed else 0


def share_of(cases: Sequence[Case], share: Share) -> list[Case]:
    """The cases of one process; those that run the same programs stay together."""
    together = [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.programs_key)]
    return list(itertools.chain.from_iterable(share.of(together)))


def _run_case(case: Case, clock: StepTimer, rounds: int) -> list[Record]:
    return _RUN_CASE[case.bench](case, clock, rounds)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.sweep",
        "Times top-k, permute and the layer over tokens x hidden x experts x k x capacity factor, the most telling "
        "cases first, and appends records to DIR/sweep.jsonl. Cases that the file has are skipped. Sizes that are "
        "given pick cases out of the grid. The exit status is 1 if a case failed or gave a wrong result.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a grid of small cases: a minute or so on two CPU cores")
    add("--list", action="store_true", help="print the cases and stop")
    add("--bench", type=NAMES, metavar="NAME,...", default=",".join(BENCHES), help="some of %(default)s")
    for name in ("tokens", "hidden", "experts", "k"):
        add(f"--{name}", type=POSITIVE_INTS, metavar="N,...", help="only cases with one of these")
    add("--load", type=NAMES, metavar="NAME,...", help="only cases with one of these")
    add_load_options(parser)
    add(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes that trace and compile their cases side by side and measure one at a time (default 1): on "
        "a machine with an accelerator about as many as it has CPU cores",
    )
    add_run_options(parser)
    return parser


def _select(cases: Sequence[Case], args: argparse.Namespace) -> list[Case]:
    """The cases of the grid that the options leave.

    Raises:
      ValueError: they leave none.
    """
    own = {"zipf": {"zipf_exponent": args.zipf_exponent}, "text": {"text": args.text}}
    left = list(cases)
    for name in ("bench", "load", "tokens", "hidden", "experts", "k"):
        allowed = getattr(args, name)
        have = sorted({getattr(case, name) for case in cases})
        if allowed is not None and (strange := [value for value in allowed if value not in have]):
            raise ValueError(f"--{name} must be among those of the grid, {', '.join(map(str, have))}; got {strange[0]}")
        left = [case for case in left if allowed is None or getattr(case, name) in allowed]
    if not left:
        raise ValueError("no case of the grid has all of the sizes that were given; --list shows those that there are")
    return [dataclasses.replace(case, **own.get(case.load, {})) for case in left]


if __name__ == "__main__":
    sys.exit(run_command(main))

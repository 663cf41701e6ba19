"""Which router learns better, and at what price, in a small transformer over bytes.

A small transformer over bytes is trained on the same text, for the same tokens, once with each router and seed. Records
go to train.jsonl (see `bench.training.records`), the report beside it (see `bench.plot`).
"""

import argparse
import contextlib
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax

from bench.command.parser import make_parser, run
from bench.command.values import NAMES, natural_int, output_file, output_folder, positive_float, positive_int
from bench.inputs.corpus import Corpus, load_corpus
from bench.measure.clock import Stopwatch
from bench.plot import say_report
from bench.processes.side_by_side import my_share, my_turns, prepare_jobs, run_side_by_side
from bench.record.files import holding
from bench.record.json_files import write_json
from bench.record.progress import Progress
from bench.record.provenance import chip_name, provenance
from bench.record.tables import format_table
from bench.training.checkpoints import latest_step, open_checkpoints, require_orbax
from bench.training.learner import Learner
from bench.training.records import FILE_NAME, read_runs, run_name
from bench.training.runs import compile_learner, fit_steps, train
from bench.training.settings import ROUTERS, Settings
from bench.training.table import HEADERS, summaries, table_rows, warnings_of

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CHECKPOINTS = "checkpoints"

_KINDS = ("quick", "cpu", "accelerator")
_SIZES: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("--hidden", "hidden_size", "H, width of a token", (64, 128, 512)),
    ("--intermediate", "intermediate_size", "I, width of an expert", (64, 128, 512)),
    ("--experts", "num_experts", "E, experts of a layer", (8, 8, 16)),
    ("--top-k", "top_k", "K, experts a token (1 with the switch router, whatever this is)", (2, 2, 2)),
    ("--layers", "num_layers", "blocks of attention and experts", (2, 4, 6)),
    ("--heads", "num_heads", "heads of the attention", (4, 4, 8)),
    ("--batch", "batch_size", "sequences in a step", (8, 16, 32)),
    ("--length", "length", "bytes of a sequence", (128, 256, 512)),
    ("--steps", "steps", "steps of each run", (100, 1000, 2000)),
    ("--evaluations", "evaluations", "looks at the held-out text", (5, 10, 10)),
    ("--learning-rate", "learning_rate", "the peak", (3e-3, 2e-3, 1e-3)),
)
"""Options that are fields of `Settings`: what they mean, and their defaults for each of `_KINDS`."""


def main(argv: Sequence[str]) -> int:
    """Trains, records, prints the table, and makes the report; 1 when a run diverged."""
    args = _parser().parse_args(argv)
    names = list(dict.fromkeys(args.routers or ROUTERS))
    if unknown := [name for name in names if name not in ROUTERS]:
        raise ValueError(f"--routers must be some of {', '.join(ROUTERS)}; got {unknown[0]!r}")
    prepare_jobs(args.jobs)
    if args.checkpoint_every:
        require_orbax()
    if args.minutes is not None and (args.resume or args.steps is not None or args.jobs > 1):
        raise ValueError(
            "--minutes finds the steps, so it goes without --steps; without --resume, which needs the steps that the "
            "runs began with; and without --jobs, whose processes have to know them beforehand: pass --steps"
        )
    if args.resume and args.overwrite:
        raise ValueError("--resume keeps the runs in --out and --overwrite removes them; pass one of the two")
    settings = _settings(args)
    corpus = load_corpus(args.text, settings.length)
    corpus.held_out_batches(settings.batch_size, 1)

    head = {
        **provenance("bench.train", argv, chip_name(), _PACKAGES, args.commit),
        "settings": dataclasses.asdict(settings),
        "text": {"source": corpus.source, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
    }
    if (share := my_share()) is not None:
        _train_routers(share.of(names), settings, corpus, head, args)
        return 0
    with holding(args.out):
        _prepare(args, head)
        failed = False
        if args.jobs > 1:
            failed = any(run_side_by_side("bench.train", argv, args.jobs, args.out))
        else:
            settings = _train_routers(names, settings, corpus, head, args)
        diverged = _report(args, names, settings, corpus, head)
    return 1 if failed or diverged else 0


def _report(
    args: argparse.Namespace, names: Sequence[str], settings: Settings, corpus: Corpus, head: dict[str, Any]
) -> bool:
    """Prints and writes what came of the routers' runs; returns whether one diverged."""
    runs = [run for run in read_runs(args.out / FILE_NAME).values() if run.head["router"] in names]
    shown = summaries(runs)
    if args.json != "-":
        tokens = settings.steps * settings.batch_size * settings.length
        sizes = f"{settings.num_layers} layers, hidden {settings.hidden_size}, {settings.num_experts} experts"
        budget = f"{settings.steps:,} steps, {tokens:,} bytes a run of {corpus.source}"
        print(f"{head['chip']}, commit {head['commit']}; {sizes}, {budget}")
        print(format_table(HEADERS, table_rows(shown)))
        for line in warnings_of(shown):
            print(line)
    if args.json is not None:
        write_json(
            {"settings": dataclasses.asdict(settings), "routers": [dataclasses.asdict(row) for row in shown]}, args.json
        )
    say_report(args.out)
    return any(row.diverged for row in shown)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.train",
        "Trains a small transformer over bytes with each router, on the same text for the same tokens, and compares "
        f"the loss on held-out text and the speed. Routers: {', '.join(ROUTERS)}. Sizes have defaults for --quick "
        "(2 CPU cores, under 5 minutes for all routers), a CPU and an accelerator.",
        (
            "--quick",
            "--routers softmax,switch,loss_free --seeds 5 --out results/three",
            "--text tinystories.txt --minutes 25 --out results/tiny",
            "--steps 5000 --checkpoint-every 500 --out results/long            (and with --resume, if it was stopped)",
            "--steps 500 --jobs 10 --out results/gpu            (on a machine with one GPU and many cores)",
            "--hidden 1024 --layers 8 --experts 64 --top-k 4 --batch 64 --length 1024 --steps 5000",
        ),
    )
    add = parser.add_argument
    add("--routers", type=NAMES, metavar="NAME,...", help="train these only (default: all)")
    add(
        "--seeds",
        type=positive_int,
        default=3,
        metavar="N",
        help="runs of each router, seeds 0 to N − 1 (default: %(default)s)",
    )
    add("--text", type=pathlib.Path, metavar="PATH", help="file or folder (default: sources of the standard library)")
    add("--out", type=output_folder, default="results", metavar="DIR", help="default: %(default)s")
    add("--quick", action="store_true", help="a tiny model and few steps")
    for option, name, meaning, values in _SIZES:
        shown = ", ".join(map(str, values))
        kind, metavar = (positive_int, "N") if isinstance(values[0], int) else (positive_float, "X")
        add(option, type=kind, dest=name, metavar=metavar, help=f"{meaning} (default: {shown})")
    add("--minutes", type=positive_float, help="as many steps, the same for every run, as all runs fit into")
    add(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes that trace and compile their routers side by side and train one at a time (default: "
        "%(default)s): on an accelerator one for each router, if there are as many CPU cores",
    )
    add("--capacity-factor", type=positive_float, metavar="X", help="of experts (default: drop nothing)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--backend", default="auto", help="of the layer's operators (default: %(default)s)")
    add("--checkpoint-every", type=natural_int, default=0, metavar="N", help="keep the state of every run each N steps")
    add("--resume", action="store_true", help="add to the runs in DIR: finished ones stay, others go on or begin")
    add("--overwrite", action="store_true", help="remove the runs in DIR first")
    add("--json", type=output_file, metavar="PATH", help="write the table to PATH as JSON, - for standard output only")
    add("--commit", help="the commit to record (default: what git says)")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    on_cpu = jax.default_backend() == "cpu"
    kind = _KINDS.index("quick" if args.quick else "cpu" if on_cpu else "accelerator")
    sizes: dict[str, Any] = {name: getattr(args, name) or values[kind] for _, name, _, values in _SIZES}
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    return Settings(**sizes, dtype=dtype, backend=args.backend, capacity_factor=args.capacity_factor)


def _prepare(args: argparse.Namespace, head: dict[str, Any]) -> None:
    """Makes the folder ready.

    Raises:
      ValueError: it has runs that are not to be resumed, or were made with other settings, text or chip, or whose
        checkpoints are newer than their records.
    """
    file, checkpoints = args.out / FILE_NAME, args.out / _CHECKPOINTS
    if args.overwrite:
        file.unlink(missing_ok=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    runs = read_runs(file)
    if runs and not args.resume:
        raise ValueError(
            f"{file} holds {len(runs)} runs already; --resume adds to them, --overwrite removes them, and --out DIR "
            "puts the new ones elsewhere"
        )
    for folder in sorted(checkpoints.glob("*")):
        last = runs[folder.name].last_step if folder.name in runs else 0
        if last < (step := latest_step(folder)):
            raise ValueError(
                f"{file}: the records of {folder.name} end at step {last}, but its checkpoint is of step {step}: lines "
                f"are missing; put them back, or remove {folder} to begin that run anew"
            )
    now = _what_made(head)
    for name, earlier in runs.items():
        was = _what_made(earlier.head)
        unlike = [key for key in was | now if was.get(key) != now.get(key)]
        if unlike:
            listed = "; ".join(f"{key} is {was.get(key)!r} there and {now.get(key)!r} here" for key in unlike)
            raise ValueError(f"{file}: {name} was made otherwise: {listed}; pass the same, or another --out")


def _what_made(head: dict[str, Any]) -> dict[str, Any]:
    return {"chip": head["chip"], "text": head["text"]["sha256"], **head["settings"]}


def _train_routers(
    names: Sequence[str], settings: Settings, corpus: Corpus, head: dict[str, Any], args: argparse.Namespace
) -> Settings:
    """Compiles the routers that have runs to do, and does them; the settings with the steps that --minutes found."""
    watch, turns = Stopwatch(), my_turns(args.out)
    finished = {name for name, run in read_runs(args.out / FILE_NAME).items() if run.end is not None}
    # Seed by seed, so that what is done when a run is cut short compares all routers.
    todo = [(name, seed) for seed in range(args.seeds) for name in names if run_name(name, seed) not in finished]
    learners: dict[str, Learner] = {}
    with turns.beside():
        routers = list(dict.fromkeys(name for name, _ in todo))
        progress = Progress(len(routers))
        for name in routers:
            progress.show(len(learners), f"compiling {name}")
            learners[name] = compile_learner(name, settings, corpus)
    if args.minutes is not None:
        seconds = 60 * args.minutes - watch.seconds
        settings = fit_steps(settings, list(learners.values()), args.seeds, corpus, seconds)
        head = {**head, "settings": dataclasses.asdict(settings)}
    progress = Progress(len(todo) * settings.steps)
    for number, (name, seed) in enumerate(todo):

        def show(step: int, line: str, number: int = number, name: str = name, seed: int = seed) -> None:
            if sys.stderr.isatty() or step % settings.evaluate_every == 0:
                progress.show(number * settings.steps + step, f"{name}, seed {seed}, step {step}: {line}")

        folder = args.out / _CHECKPOINTS / run_name(name, seed)
        keeps = args.checkpoint_every or folder.exists()
        with turns.alone(), open_checkpoints(folder) if keeps else contextlib.nullcontext() as checkpoints:
            train(
                learners[name],
                seed,
                settings,
                corpus,
                args.out / FILE_NAME,
                head,
                checkpoints=checkpoints,
                checkpoint_every=args.checkpoint_every,
                show=show,
            )
    return settings


if __name__ == "__main__":
    sys.exit(run(main))

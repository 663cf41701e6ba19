"""Which router learns better, and at what price, in a small transformer over bytes.

A small transformer over bytes is trained on the same text, for the same tokens, once with each router and seed. Records
go to train.jsonl (see `bench.training.records`), the report beside it (see `bench.plot`).
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from bench.command.parser import make_parser, run
from bench.command.side_by_side import my_share, my_turns, prepare_jobs, run_side_by_side
from bench.inputs.corpus import Corpus, load_corpus
from bench.measure.turns import Turns
from bench.plot import say_report
from bench.record.progress import Progress
from bench.record.provenance import chip_name, provenance
from bench.record.tables import format_table, write_json
from bench.training.checkpoints import open_checkpoints, require_orbax
from bench.training.records import FILE_NAME, Run, read_runs, run_name
from bench.training.runs import Variant, compile_variant, fit_steps, train
from bench.training.settings import ROUTERS, Settings, check_router
from bench.training.table import HEADERS, summaries, table_rows, warnings_of

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CHECKPOINTS = "checkpoints"

_SIZES: dict[str, dict[str, Any]] = {
    "quick": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_experts": 8,
        "top_k": 2,
        "num_layers": 2,
        "num_heads": 4,
        "batch_size": 8,
        "length": 128,
        "steps": 100,
        "seeds": 3,
        "learning_rate": 3e-3,
        "evaluations": 5,
    },
    "cpu": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_experts": 8,
        "top_k": 2,
        "num_layers": 4,
        "num_heads": 4,
        "batch_size": 16,
        "length": 256,
        "steps": 1000,
        "seeds": 3,
        "learning_rate": 2e-3,
    },
    "accelerator": {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_experts": 16,
        "top_k": 2,
        "num_layers": 6,
        "num_heads": 8,
        "batch_size": 32,
        "length": 512,
        "steps": 2000,
        "seeds": 3,
        "learning_rate": 1e-3,
    },
}


def main(argv: Sequence[str]) -> int:
    """Trains, records, prints the table, and makes the report; 1 when a run diverged."""
    args = _parser().parse_args(argv)
    names = _router_names(args.routers)
    prepare_jobs(args.jobs)
    if args.checkpoint_every:
        require_orbax()
    on_cpu = jax.default_backend() == "cpu"
    sizes = _sizes(args, "quick" if args.quick else "cpu" if on_cpu else "accelerator")
    seeds = sizes.pop("seeds")
    if seeds < 1 or args.checkpoint_every < 0:
        raise ValueError(
            f"--seeds must be at least 1, --checkpoint-every at least 0; got {seeds}, {args.checkpoint_every}"
        )
    if args.minutes is not None and (args.resume or args.steps is not None or args.jobs > 1 or not args.minutes > 0):
        raise ValueError(
            "--minutes takes a positive number and finds the steps, so it goes without --steps; without --resume, "
            "which needs the steps that the runs began with; and without --jobs, whose processes have to know them "
            "beforehand: pass --steps"
        )
    settings = Settings(**sizes, dtype=args.dtype or ("float32" if on_cpu else "bfloat16"), backend=args.backend)
    corpus = load_corpus(args.text, settings.length)
    corpus.held_out_batches(settings.batch_size, 1)

    out = args.out
    file = out / FILE_NAME
    head = _head(argv, args.commit, settings, corpus)
    if (share := my_share()) is not None:
        _train_routers(share.of(names), seeds, settings, corpus, head, args)
        return 0
    _prepare(out, args)
    _check_same(read_runs(file), head, file)
    failed = False
    if args.jobs > 1:
        failed = any(run_side_by_side("bench.train", argv, args.jobs, out))
    else:
        settings = _train_routers(names, seeds, settings, corpus, head, args)

    runs = {name: run for name, run in read_runs(file).items() if run.head["router"] in names}
    shown = summaries(runs.values())
    if args.json != "-":
        print(f"{head['chip']}, commit {head['commit']}; {_budget(settings, corpus)}")
        print(format_table(HEADERS, table_rows(shown)))
        for line in warnings_of(shown):
            print(line)
    if args.json is not None:
        write_json(
            {"settings": dataclasses.asdict(settings), "routers": [dataclasses.asdict(row) for row in shown]}, args.json
        )
    say_report(out)
    return 1 if failed or any(row.diverged for row in shown) else 0


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
    parser.add_argument("--routers", metavar="NAME,...", help="train these only (default: all)")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each router, seeds 0 to N − 1 (default: 3)")
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="PATH", help="file or folder (default: sources of the standard library)"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    sizes = (
        ("--hidden", "hidden_size", "H, width of a token"),
        ("--intermediate", "intermediate_size", "I, width of an expert"),
        ("--experts", "num_experts", "E, experts of a layer"),
        ("--top-k", "top_k", "K, experts a token (1 with the switch router, whatever this is)"),
        ("--layers", "num_layers", "blocks of attention and experts"),
        ("--heads", "num_heads", "heads of the attention"),
        ("--batch", "batch_size", "sequences in a step"),
        ("--length", "length", "bytes of a sequence"),
        ("--steps", "steps", "steps of each run"),
    )
    for option, name, meaning in sizes:
        values = ", ".join(str(table[name]) for table in _SIZES.values())
        parser.add_argument(option, type=int, dest=name, metavar="N", help=f"{meaning} (default: {values})")
    parser.add_argument("--minutes", type=float, help="as many steps, the same for every run, as all runs fit into")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that trace and compile their routers side by side and train one at a time (default: "
        "%(default)s): on an accelerator one for each router, if there are as many CPU cores",
    )
    parser.add_argument("--learning-rate", type=float, metavar="X", help="the peak (default: 3e-3, 2e-3, 1e-3)")
    parser.add_argument("--capacity-factor", type=float, metavar="X", help="of experts (default: drop nothing)")
    parser.add_argument(
        "--evaluations", type=int, metavar="N", help="looks at the held-out text (default: 10, --quick 5)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 elsewhere"
    )
    parser.add_argument("--backend", default="auto", help="of the layer's operators (default: %(default)s)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N", help="keep the state of every run each N steps"
    )
    parser.add_argument(
        "--resume", action="store_true", help="add to the runs in DIR: finished ones stay, others go on or begin"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the runs in DIR first")
    parser.add_argument("--json", metavar="PATH", help="write the table to PATH as JSON, - for standard output only")
    parser.add_argument("--commit", help="what to record as the commit where git does not know it")
    return parser


def _router_names(given: str | None) -> list[str]:
    names = list(ROUTERS) if given is None else list(dict.fromkeys(given.split(",")))
    for name in names:
        check_router(name)
    return names


def _sizes(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    names = {*_SIZES[kind], "capacity_factor", "evaluations"}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return {**_SIZES[kind], **given}


def _prepare(out: pathlib.Path, args: argparse.Namespace) -> None:
    """Makes the folder ready."""
    file = out / FILE_NAME
    if args.resume and args.overwrite:
        raise ValueError("--resume keeps the runs in --out and --overwrite removes them; pass one of the two")
    if args.overwrite:
        file.unlink(missing_ok=True)
        shutil.rmtree(out / _CHECKPOINTS, ignore_errors=True)
    runs = read_runs(file)
    if runs and not args.resume:
        raise ValueError(
            f"{file} holds {len(runs)} runs already; --resume adds to them, --overwrite removes them, and --out DIR "
            "puts the new ones elsewhere"
        )
    out.mkdir(parents=True, exist_ok=True)


def _compile(names: Sequence[str], settings: Settings, corpus: Corpus) -> list[Variant]:
    progress = Progress(len(names))
    variants = []
    for done, name in enumerate(names):
        progress.show(done, f"compiling {name}")
        variants.append(compile_variant(name, settings, corpus))
    return variants


def _head(argv: Sequence[str], commit: str | None, settings: Settings, corpus: Corpus) -> dict[str, Any]:
    text = {"source": corpus.source, "sha256": corpus.sha256, "bytes": corpus.num_bytes}
    return {
        **provenance("bench.train", argv, chip_name(), _PACKAGES, commit),
        "settings": dataclasses.asdict(settings),
        "text": text,
    }


def _check_same(runs: dict[str, Run], head: dict[str, Any], file: pathlib.Path) -> None:
    """Runs of other settings, text or chip cannot be compared with, or continued."""
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
    names: Sequence[str],
    seeds: int,
    settings: Settings,
    corpus: Corpus,
    head: dict[str, Any],
    args: argparse.Namespace,
) -> Settings:
    """Compiles the routers that have runs to do, and does them; the settings with the steps that --minutes found."""
    begin = time.monotonic()
    finished = {name for name, run in read_runs(args.out / FILE_NAME).items() if run.end is not None}
    todo = [name for name in names if any(run_name(name, seed) not in finished for seed in range(seeds))]
    turns = my_turns(args.out)
    with turns.beside():
        variants = _compile(todo, settings, corpus)
    if args.minutes is not None:
        settings = fit_steps(settings, variants, seeds, corpus, 60 * args.minutes - (time.monotonic() - begin))
        head = {**head, "settings": dataclasses.asdict(settings)}
    _train_all(variants, seeds, settings, corpus, head, args, finished, turns)
    return settings


def _train_all(
    variants: Sequence[Variant],
    seeds: int,
    settings: Settings,
    corpus: Corpus,
    head: dict[str, Any],
    args: argparse.Namespace,
    finished: set[str],
    turns: Turns,
) -> None:
    # Seed by seed, so that what is done when a run is cut short compares all routers.
    todo = [(v, seed) for seed in range(seeds) for v in variants if run_name(v.name, seed) not in finished]
    progress = Progress(len(todo) * settings.steps)
    begun = read_runs(args.out / FILE_NAME)
    for number, (variant, seed) in enumerate(todo):

        def show(step: int, line: str, number: int = number, variant: Variant = variant, seed: int = seed) -> None:
            if sys.stderr.isatty() or step % settings.evaluate_every == 0:
                done = number * settings.steps + step
                progress.show(done, f"{variant.name}, seed {seed}, step {step}: {line}")

        name = run_name(variant.name, seed)
        folder = args.out / _CHECKPOINTS / name
        arguments = (variant, seed, settings, corpus, args.out / FILE_NAME, head)
        if name not in begun:
            shutil.rmtree(folder, ignore_errors=True)
        with turns.alone():
            if args.checkpoint_every or folder.exists():
                with open_checkpoints(folder) as checkpoints:
                    train(*arguments, checkpoints=checkpoints, checkpoint_every=args.checkpoint_every, show=show)
            else:
                train(*arguments, show=show)


def _budget(settings: Settings, corpus: Corpus) -> str:
    tokens = settings.steps * settings.batch_size * settings.length
    sizes = f"{settings.num_layers} layers, hidden {settings.hidden_size}, {settings.num_experts} experts"
    return f"{sizes}, {settings.steps:,} steps, {tokens:,} bytes a run of {corpus.source}"


if __name__ == "__main__":
    sys.exit(run(main))

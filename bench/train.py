"""Which router and precision learn better, and at what price, in a small transformer over bytes.

It is trained on the same text, for the same tokens, once with each router, precision and seed. Records go to
train.jsonl (see `bench.training.records`), the report beside it (see `bench.plot`).
"""

import argparse
import contextlib
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax

from bench.command.parser import run
from bench.command.values import positive_int
from bench.inputs.corpus import Corpus, load_corpus
from bench.measure.clock import Stopwatch
from bench.processes.side_by_side import my_share, my_turns, prepare_jobs, run_side_by_side
from bench.record.files import holding
from bench.record.progress import Progress
from bench.record.provenance import chip_name, provenance
from bench.training.checkpoints import latest_step, open_checkpoints, require_orbax
from bench.training.learner import Learner
from bench.training.options import settings_of, training_parser, variants_of
from bench.training.records import FILE_NAME, Run, read_runs, run_name
from bench.training.report import report
from bench.training.runs import compile_learner, fit_steps, train
from bench.training.settings import Settings, Variant, check_models

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CHECKPOINTS = "checkpoints"

_PAUSED = 3
"""The exit status when --pause-after left runs unfinished."""


def main(argv: Sequence[str]) -> int:
    """Trains, records, prints the table, and makes the report; 1 when a run diverged, 3 when some are to go on."""
    args = training_parser().parse_args(argv)
    if args.report is not None:
        return int(report(args.report, _runs_of(args.report), args.json))
    variants = variants_of(args.routers, args.precisions)
    prepare_jobs(args.jobs if args.devices == "1" else max(2, args.jobs))  # before jax takes the devices' memory
    devices = _count_devices(args.devices)
    jobs = max(args.jobs, devices)
    if args.checkpoint_every or args.pause_after:
        require_orbax()
    if args.minutes is not None and (args.resume or args.steps is not None or jobs > 1):
        raise ValueError(
            "--minutes finds the steps, so it goes without --steps; without --resume, which needs the steps that the "
            "runs began with; and without --jobs and --devices, whose processes have to know them beforehand: pass "
            "--steps"
        )
    if args.resume and args.overwrite:
        raise ValueError("--resume keeps the runs in --out and --overwrite removes them; pass one of the two")
    settings = settings_of(args)
    corpus = load_corpus(args.text, settings.length)
    corpus.held_out_batches(settings.batch_size, 1)

    head = {
        **provenance("bench.train", argv, chip_name(), _PACKAGES, args.commit),
        "settings": settings.record(),
        "text": {"source": corpus.source, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
    }
    if (share := my_share()) is not None:
        _train_variants(share.of(variants), settings, corpus, head, args)
        return 0
    check_models(variants, settings)  # once, and not in each of the processes side by side
    with holding(args.out):
        _prepare(args, head)
        failed = False
        if jobs > 1:
            failed = any(run_side_by_side("bench.train", argv, jobs, args.out, devices))
        else:
            _train_variants(variants, settings, corpus, head, args)
        runs = _runs_of(args.out, variants)
        left = len(variants) * args.seeds - sum(run.end is not None and run.head["seed"] < args.seeds for run in runs)
        diverged = report(args.out, runs, args.json) if runs else False
    if left:
        print(f"{left} runs are not finished: the same command goes on with --resume", file=sys.stderr)
    return 1 if failed or diverged else _PAUSED if left else 0


def _runs_of(folder: pathlib.Path, variants: Sequence[Variant] | None = None) -> list[Run]:
    return [run for run in read_runs(folder / FILE_NAME).values() if variants is None or run.variant in variants]


def _count_devices(wanted: str) -> int:
    """How many devices to train on.

    Raises:
      ValueError: there are not so many.
    """
    if my_share() is not None:
        return 1
    there = jax.local_device_count()
    number = there if wanted == "all" else positive_int(wanted) if wanted.isdecimal() and int(wanted) else 0
    if not 1 <= number <= there:
        raise ValueError(f"--devices must be all or a number from 1 to {there}, the devices there are; got {wanted!r}")
    return number


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


def _train_variants(
    variants: Sequence[Variant], settings: Settings, corpus: Corpus, head: dict[str, Any], args: argparse.Namespace
) -> None:
    """Compiles the variants that have runs to do, and does them, until all are done or --pause-after is over."""
    watch, turns = Stopwatch(), my_turns(args.out)

    def is_over() -> bool:
        return args.pause_after is not None and watch.seconds > 60 * args.pause_after

    finished = {name for name, run in read_runs(args.out / FILE_NAME).items() if run.end is not None}
    # Seed by seed, so that what is done when a run is cut short compares all routers.
    todo = [(each, seed) for seed in range(args.seeds) for each in variants if run_name(each, seed) not in finished]
    learners: dict[Variant, Learner] = {}
    with turns.beside():
        wanted = list(dict.fromkeys(variant for variant, _ in todo))
        progress = Progress(len(wanted))
        for variant in wanted:
            if is_over():
                return
            progress.show(len(learners), f"compiling {variant.name}")
            learners[variant] = compile_learner(variant, settings, corpus)
    if args.minutes is not None:
        seconds = 60 * args.minutes - watch.seconds
        settings = fit_steps(settings, list(learners.values()), args.seeds, corpus, seconds)
        head = {**head, "settings": settings.record()}

    progress = Progress(len(todo) * settings.steps)
    for number, (variant, seed) in enumerate(todo):

        def show(step: int, line: str, number: int = number, name: str = variant.name, seed: int = seed) -> None:
            if sys.stderr.isatty() or step % settings.evaluate_every == 0:
                progress.show(number * settings.steps + step, f"{name}, seed {seed}, step {step}: {line}")

        folder = args.out / _CHECKPOINTS / run_name(variant, seed)
        keeps = args.checkpoint_every or args.pause_after or folder.exists()
        with turns.alone(), open_checkpoints(folder) if keeps else contextlib.nullcontext() as checkpoints:
            if is_over():
                return
            train(
                learners[variant],
                seed,
                settings,
                corpus,
                args.out / FILE_NAME,
                head,
                checkpoints=checkpoints,
                checkpoint_every=args.checkpoint_every,
                is_over=is_over,
                show=show,
            )


if __name__ == "__main__":
    sys.exit(run(main))

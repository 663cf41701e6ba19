"""The options of `bench.train`: its parser, and what they say to train."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from bench.command.parser import make_parser
from bench.command.values import (
    NAMES,
    POSITIVE_INTS,
    natural_int,
    output_file,
    output_folder,
    positive_float,
    positive_int,
)
from bench.training.settings import BASELINE_PRECISION, PRECISIONS, ROUTERS, Settings, Variant

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
    ("--evaluations", "evaluations", "looks at the held-out text, evenly spaced", (5, 10, 10)),
    ("--held-out", "held_out_batches", "batches of held-out text in a look", (8, 8, 32)),
    ("--learning-rate", "learning_rate", "the peak", (3e-3, 2e-3, 1e-3)),
)
"""Options that are fields of `Settings`: what they mean, and their defaults for each of `_KINDS`."""


def training_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = make_parser(
        "bench.train",
        "Trains a small transformer over bytes with each router, on the same text for the same tokens, and compares "
        f"the loss on held-out text and the speed. Routers: {', '.join(ROUTERS)}. Precisions of the experts: "
        f"{', '.join(PRECISIONS)}: --dtype, FP8 forward, FP8 forward and backward. Sizes have defaults for --quick "
        "(2 CPU cores, under 5 minutes for all routers), a CPU and an accelerator. The exit status is 3 when runs are "
        "left to go on with --resume.",
        (
            "--quick",
            "--routers softmax,switch,loss_free --seeds 5 --out results/three",
            "--text tinystories.txt --minutes 25 --out results/tiny",
            "--steps 5000 --checkpoint-every 500 --out results/long            (and with --resume, if it was stopped)",
            "--steps 500 --jobs 10 --out results/gpu            (on a machine with one GPU and many cores)",
            "--routers all,softmax:w8a8,softmax:w8a8g8 --devices all --jobs 12 --pause-after 9 --out results/fp8",
            "--report results/fp8",
            "--hidden 1024 --layers 8 --experts 64 --top-k 4 --batch 64 --length 1024 --steps 5000",
        ),
    )
    add = parser.add_argument
    add("--routers", type=NAMES, metavar="NAME,...", help="train these only; NAME:PRECISION in that one (default: all)")
    add(
        "--precisions",
        type=NAMES,
        metavar="NAME,...",
        help=f"each router in each of these, but those that name their own (default: {BASELINE_PRECISION})",
    )
    add(
        "--seeds",
        type=positive_int,
        default=3,
        metavar="N",
        help="runs of each router, seeds 0 to N − 1 (default: %(default)s)",
    )
    add(
        "--text",
        type=pathlib.Path,
        metavar="PATH",
        help="file, perhaps packed as .gz or .xz, or folder (default: sources of the standard library); "
        "bench.corpus makes a long one",
    )
    add("--out", type=output_folder, default="results", metavar="DIR", help="default: %(default)s")
    add("--quick", action="store_true", help="a tiny model and few steps")
    for option, name, meaning, values in _SIZES:
        shown = ", ".join(map(str, values))
        kind, metavar = (positive_int, "N") if isinstance(values[0], int) else (positive_float, "X")
        add(option, type=kind, dest=name, metavar=metavar, help=f"{meaning} (default: {shown})")
    add("--look-at", type=POSITIVE_INTS, metavar="N,...", help="further steps after which to look at held-out text")
    add("--minutes", type=positive_float, help="as many steps, the same for every run, as all runs fit into")
    add(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes that trace and compile their routers side by side and train one at a time (default: "
        "%(default)s): on an accelerator one for each router, if there are as many CPU cores",
    )
    add(
        "--devices",
        default="1",
        metavar="N",
        help="GPUs to which the processes are dealt, or all (default: %(default)s); --jobs is at least as many",
    )
    add("--capacity-factor", type=positive_float, metavar="X", help="of experts (default: drop nothing)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--backend", default="auto", help="of the layer's operators (default: %(default)s)")
    add("--checkpoint-every", type=natural_int, default=0, metavar="N", help="keep the state of every run each N steps")
    add(
        "--pause-after",
        type=positive_float,
        metavar="MINUTES",
        help="stop then, with a checkpoint of every run that is not finished, for --resume",
    )
    add("--resume", action="store_true", help="add to the runs in DIR: finished ones stay, others go on or begin")
    add("--overwrite", action="store_true", help="remove the runs in DIR first")
    add("--json", type=output_file, metavar="PATH", help="write the table to PATH as JSON, - for standard output only")
    add("--report", type=pathlib.Path, metavar="DIR", help="train nothing, show what the records in DIR say")
    add("--commit", help="the commit to record (default: what git says)")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that options give, by default those of a CPU or an accelerator.

    Raises:
      ValueError: a look at held-out text is asked for after the last step.
    """
    on_cpu = jax.default_backend() == "cpu"
    kind = _KINDS.index("quick" if args.quick else "cpu" if on_cpu else "accelerator")
    sizes: dict[str, Any] = {name: getattr(args, name) or values[kind] for _, name, _, values in _SIZES}
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    looks = tuple(sorted(args.look_at or ()))
    if looks and looks[-1] > sizes["steps"]:
        raise ValueError(f"--look-at must be at most --steps, {sizes['steps']}, got {looks[-1]}")
    return Settings(**sizes, looks=looks, dtype=dtype, backend=args.backend, capacity_factor=args.capacity_factor)


def variants_of(routers: Sequence[str] | None, precisions: Sequence[str] | None) -> list[Variant]:
    """Every router in every precision, but for routers that name their own.

    Raises:
      ValueError: there is no such router or precision.
    """
    found = []
    for name in routers or ["all"]:
        router, _, own = name.partition(":")
        for each in ROUTERS if router == "all" else [router]:
            found += [Variant(each, precision) for precision in ([own] if own else precisions or [BASELINE_PRECISION])]
    for variant in found:
        if variant.router not in ROUTERS:
            raise ValueError(f"--routers must be some of all, {', '.join(ROUTERS)}; got {variant.router!r}")
        if variant.precision not in PRECISIONS:
            raise ValueError(f"a precision must be one of {', '.join(PRECISIONS)}; got {variant.precision!r}")
    return list(dict.fromkeys(found))

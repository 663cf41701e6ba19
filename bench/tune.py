"""Tunes the tiles of the grouped products on an NVIDIA Hopper GPU, or when their kernels start (`--prefetch`).

Times configurations of the kernels product by product, and keeps those that beat the model's choice in the table that
`pallas_kernels.grouped_matmul.gpu.hopper.tiling` reads first. With `--prefetch` it times chains of products, and
changes no table (`bench.hopper.tune_prefetch`).
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.command.parser import make_parser, run
from bench.command.values import output_file, positive_float
from bench.hopper.products import PRODUCT_DTYPES, Product, hopper_at_hand
from bench.hopper.tune_measure import ConfigTimer
from bench.hopper.tune_prefetch import DTYPE as CHAIN_DTYPE
from bench.hopper.tune_prefetch import MINUTES as CHAIN_MINUTES
from bench.hopper.tune_prefetch import add_options, layer_chain, shape_chain, tune_prefetch
from bench.hopper.tune_products import case_products, default_products
from bench.hopper.tune_search import LEAST_GAIN, Outcome, search
from bench.measure.errors import one_line
from bench.model.shapes import parse_shape
from bench.record.json_files import read_json, write_json
from bench.record.progress import Progress
from bench.record.provenance import provenance
from bench.record.tables import Cell, format_table
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul.gpu.hopper import tuned_table
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config
from pallas_kernels.grouped_matmul.gpu.hopper.tuned_table import Key

_MINUTES = 5.5
_DTYPE = "bf16"
_REPEATS = 5
_QUICK_REPEATS = 3
_PACKAGES = ("jax", "jaxlib")
_TABLES = Path(tuned_table.__file__).parent / "tuned"


def main(argv: Sequence[str]) -> int:
    """Tunes, writes and prints; returns 1 when a product could not be timed."""
    args = _parser().parse_args(argv)
    _check(args)
    if args.prefetch:
        links = shape_chain(_products(args), normed=args.normed) if args.shape else layer_chain(args, args.dtype)
        return tune_prefetch(args, links, argv)
    products = _products(args)
    chip = hopper_at_hand()
    path = args.output or str(_TABLES / f"{chip.name}.json")
    head = {
        "what": "configurations of the grouped products that were measured to beat the model's choice",
        **provenance("bench.tune", argv, jax.devices()[0].device_kind, _PACKAGES, args.commit),
    }
    entries = _read_entries(path)
    tuned: list[tuple[Product, Outcome]] = []
    failed = 0
    repeats = _QUICK_REPEATS if args.quick else _REPEATS
    progress = Progress(len(products))
    for done, product in enumerate(products):
        if progress.seconds > 60 * args.minutes:
            progress.say(f"{len(products) - done} of {len(products)} products left out after {args.minutes:g} minutes")
            break
        progress.show(done, product.name, at_most=60 * args.minutes)
        try:
            # A timer holds the inputs of its product, and must be gone before the next one makes its own.
            outcome = search(product, chip, ConfigTimer(product, repeats, progress.say), exhaustive=args.exhaustive)
        except Exception as error:  # inputs that do not fit into memory, say; the other products still count
            failed += 1
            progress.say(f"FAILED: {product.name}: {one_line(error)}")
            continue
        finally:
            jax.clear_caches()  # each product needs most of the memory at times
            gc.collect()
        key = Key.of(product.problem)
        entries.pop(key, None)
        if outcome.is_worth_it:
            entries[key] = entry(key, outcome, head)
        tuned.append((product, outcome))
        if path != "-":  # after each, so that a crash of the driver leaves those before it
            write_json({**head, "entries": list(entries.values())}, path)
    progress.say(f"{len(tuned)} products in {progress.seconds:.0f} s")
    if path == "-":
        write_json({**head, "entries": list(entries.values())}, "-")
    else:
        print(_table(tuned, chip))
    return 1 if failed else 0


def entry(key: Key, outcome: Outcome, head: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of one product; it says itself what measured it, as later runs leave it where it is."""
    return {
        **dataclasses.asdict(key),
        "config": _tiles(outcome.best),
        "us": outcome.best_us,
        "model_us": outcome.model_us,
        "commit": head["commit"],
        "date": head["date"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.tune",
        "Times configurations of the grouped products on an NVIDIA Hopper GPU by the device time of their kernels, and "
        f"writes those that beat the model's choice by more than {LEAST_GAIN:.0%} to the table of the chip. Entries of "
        "products that a run does not measure stay. The exit status is 1 if a product could not be timed. With "
        "--prefetch it searches when the kernels of a chain of products start and what they fetch before, and prints "
        "the ten fastest choices beside plain launches.",
        (
            "--output h200.json",
            "--quick --output -",
            "--shape 8,48,7168,2048 --dtype fp8 --exhaustive",
            "--shape 32,16,7168,4096 --dtype fp8-blocks --fused",
            "--prefetch --json prefetch.json",
            "--prefetch --quick --model gpt-oss-120b --tokens 32",
            "--prefetch --products gate/up,down --dtype bf16",
            "--prefetch --shape 8,48,7168,2048 --shape 8,48,2048,7168",
            "--prefetch --normed --shape 1,16,4096,512",
        ),
    )
    add = parser.add_argument
    add(
        "--shape",
        action="append",
        metavar="G,M,K,N",
        help="a product; give it again for more (default: those of bench.gpu and of some published models)",
    )
    dtypes = f"of --shape's operands, of all with --prefetch (default: {_DTYPE}, with --prefetch {CHAIN_DTYPE})"
    add("--dtype", choices=tuple(PRODUCT_DTYPES), help=dtypes)
    add("--fused", action="store_true", help="N of --shape counts gate and up, multiplied together")
    add("--result-in-8-bits", action="store_true", help="with --fused: the result is rounded to FP8")
    add("--prefetch", action="store_true", help="when the kernels of a decoder layer start, not their tiles")
    add(
        "--quick",
        action="store_true",
        help=f"products of bench.gpu only, {_QUICK_REPEATS} repeats, not {_REPEATS}; with --prefetch few values",
    )
    add("--exhaustive", action="store_true", help="time all combinations, not one choice at a time")
    add(
        "--minutes",
        type=positive_float,
        help=f"begin no product after so many; the most wanted come first (default: {_MINUTES}, with --prefetch "
        f"{CHAIN_MINUTES})",
    )
    add("--output", type=output_file, metavar="PATH", help="the table, - for standard output (default: the package's)")
    add("--commit", help="the commit to record (default: what git says)")
    add_options(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Fills in what was not given, and refuses options that do nothing together."""
    only_tiles = {"--output": args.output, "--exhaustive": args.exhaustive}
    only_layers = {"--model": args.model, "--tokens": args.tokens, "--products": args.products}
    without = {**only_layers, "--normed": args.normed, "--json": args.json} if not args.prefetch else only_tiles
    if extra := [name for name, value in without.items() if value]:
        raise ValueError(f"{extra[0]} {'is not for' if args.prefetch else 'needs'} --prefetch")
    if args.shape and (extra := [name for name, value in only_layers.items() if value]):
        raise ValueError(f"--shape names all products of the chain; give it without {extra[0]}")
    if args.prefetch and not args.shape and (args.fused or args.result_in_8_bits or args.normed):
        raise ValueError("--fused, --result-in-8-bits and --normed are for products of --shape")
    args.dtype = args.dtype or (CHAIN_DTYPE if args.prefetch else _DTYPE)
    args.minutes = args.minutes or (CHAIN_MINUTES if args.prefetch else _MINUTES)


def _products(args: argparse.Namespace) -> tuple[Product, ...]:
    if args.shape:
        kind = {"fused": args.fused, "result_in_8_bits": args.result_in_8_bits}
        return tuple(Product(parse_shape(text), args.dtype, **kind) for text in args.shape)
    return case_products() if args.quick else default_products()


def _read_entries(path: str) -> dict[Key, dict[str, Any]]:
    """The entries of the table at `path` by their keys; none where there is no table."""
    if path == "-" or not Path(path).exists():
        return {}
    hints = typing.get_type_hints(Config)
    entry = {**typing.get_type_hints(Key), "config": {name: hints[name] for name in tuned_table.TILES}}
    table = read_json(Path(path), {"entries": [entry]})
    return dict(zip(tuned_table.parse_table(table), table["entries"], strict=True))


def _table(tuned: Sequence[tuple[Product, Outcome]], chip: Chip) -> str:
    headers = ["G,M,K,N", "timed", "model µs", "best µs", "gain %", "model", "best"]
    rows: list[list[Cell]] = []
    for product, outcome in tuned:
        times: list[Cell] = [outcome.num_timed, outcome.model_us, outcome.best_us, outcome.gain * 100]
        best = _text(outcome.best) if outcome.is_worth_it else "as modelled"
        rows.append([product.name, *times, _text(outcome.model), best])
    model = statistics.geometric_mean([outcome.model_us for _, outcome in tuned] or [1])
    best_us = statistics.geometric_mean([outcome.best_us for _, outcome in tuned] or [1])
    note = f"{chip.name}; configurations are {','.join(tuned_table.TILES)}; "
    return f"{note}geometric means {model:.1f} and {best_us:.1f} µs\n{format_table(headers, rows)}"


def _tiles(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in tuned_table.TILES}


def _text(config: Config) -> str:
    return ",".join(map(str, _tiles(config).values()))


if __name__ == "__main__":
    sys.exit(run(main))

"""What `bench.tune --prefetch` does: searches how the links of a chain start early, and tells what it brings.

The search (`prefetch_search`) and the clock (`prefetch_measure`) know nothing of each other; they meet here.
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bench.command.values import NAMES, output_file, positive_int
from bench.hopper.decoder_chain import MODELS, PRODUCTS, decoder_products
from bench.hopper.norms import Norm
from bench.hopper.prefetch_measure import ChainTimer, Link, leave_out_command_buffers
from bench.hopper.prefetch_search import GRID, QUICK_GRID, Choice, Comparison, compare, search
from bench.hopper.products import Product, ProductDtype, hopper_at_hand
from bench.measure.errors import one_line
from bench.measure.samples import Interval
from bench.record.json_files import write_json
from bench.record.progress import Progress
from bench.record.provenance import provenance
from bench.record.tables import Cell, format_table
from pallas_kernels.on_gpu.prefetch import Prefetch

MINUTES = 5.0
"""How long it takes at most, unless told otherwise."""

DTYPE: ProductDtype = "fp8"
"""Of operands, unless told otherwise."""

_MODEL, _TOKENS = "qwen3-30b-a3b", 64
_ROUNDS = 40
_QUICK_ROUNDS = 20
_SEARCH_SHARE = 0.8
"""Of the time, after which the search ends; the comparison of what it found takes some seconds."""


def tune_prefetch(args: argparse.Namespace, links: Mapping[str, Link], argv: Sequence[str]) -> int:
    """Searches, writes and prints.

    Args:
      args: the options of `add_options`, and `quick`, `minutes` and `commit`.
      links: the chain, in order, each by its name.
      argv: the command line, for the record.

    Raises:
      ValueError: there is no Hopper GPU, or nothing could be timed.
    """
    leave_out_command_buffers()
    chip = hopper_at_hand()
    progress = Progress(len(links) + 4)  # two more parts of a search, and two comparisons
    done = 0

    def begin(part: str) -> None:
        nonlocal done
        progress.show(done, part, at_most=60 * args.minutes)
        done += 1

    def go_on(part: str) -> bool:
        if progress.seconds > 60 * args.minutes * _SEARCH_SHARE:
            progress.say(f"left out after {progress.seconds:.0f} s: {part}")
            return False
        begin(part)
        return True

    timer = ChainTimer(list(links.values()), progress.say)
    choices = search(len(links), QUICK_GRID if args.quick else GRID, timer.sample, go_on)
    if not choices:
        raise ValueError("no choice could be timed: see why above, or give more --minutes")
    rounds = _QUICK_ROUNDS if args.quick else _ROUNDS
    begin("the best beside plain launches")
    compared = compare(choices, timer.sample, rounds)
    begin("the same with command buffers")
    in_command_buffers: dict[Choice, Comparison] = {}
    try:
        sample = functools.partial(timer.sample, in_command_buffers=True)
        in_command_buffers = {each.choice: each for each in compare(choices, sample, rounds)}
    except Exception as error:  # what was asked for is there without them
        progress.say(f"not timed with command buffers: {one_line(error)}")
    progress.say(f"{progress.seconds:.0f} s")
    if args.json is not None:
        head = provenance("bench.tune", argv, jax.devices()[0].device_kind, ("jax", "jaxlib"), args.commit)
        chosen = [_record(links, each, in_command_buffers.get(each.choice)) for each in compared]
        shapes = {name: link.name for name, link in links.items()}
        what = {"products": shapes, "kernels": timer.num_kernels, "rounds": rounds, "choices": chosen}
        write_json({**head, **what}, args.json)
    if args.json != "-":
        print(f"{chip.name}; µs of a chain of {timer.num_kernels} kernels, {rounds} rounds, ± is 95 % confidence")
        if args.shape is None:
            print("; ".join(f"{name} {link.name}" for name, link in links.items()))
        print(table(list(links), compared, in_command_buffers))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only `--prefetch` has."""
    add = parser.add_argument_group("with --prefetch").add_argument
    add("--model", choices=MODELS, help=f"whose decoder layer (default: {_MODEL})")
    add("--tokens", type=positive_int, metavar="N", help=f"of a step (default: {_TOKENS})")
    add("--products", type=NAMES, metavar="NAME,...", help=f"of the chain (default: {','.join(PRODUCTS)})")
    add("--normed", action="store_true", help="an RMSNorm before each product of --shape, rounded if that is in FP8")
    add("--json", type=output_file, metavar="PATH", help="write what was measured to PATH, - for standard output")


def shape_chain(products: Sequence[Product], *, normed: bool) -> dict[str, Link]:
    """The products of `--shape`, each with the norm before it if `normed`."""
    chain: dict[str, Link] = {}
    for product in products:
        if normed:
            norm = Norm.before(product)
            chain[f"{norm.name} before {product.name}"] = norm
        chain[product.name] = product
    return chain


def layer_chain(args: argparse.Namespace, dtype: ProductDtype) -> dict[str, Link]:
    """The products that the options of `add_options` ask for.

    Raises:
      ValueError: the name of a product is not one of `PRODUCTS`.
    """
    names = args.products or PRODUCTS
    if unknown := [name for name in names if name not in PRODUCTS]:
        raise ValueError(f"--products must be of {', '.join(PRODUCTS)}, got {unknown[0]!r}")
    products = decoder_products(args.model or _MODEL, args.tokens or _TOKENS, dtype)
    return {name: products[name] for name in names}


def table(
    names: Sequence[str], compared: Sequence[Comparison], in_command_buffers: dict[Choice, Comparison] | None = None
) -> str:
    """A line for each choice, plain launches first: mode, overlap and prefetch of each product, and times.

    Args:
      names: of the products.
      compared: without command buffers.
      in_command_buffers: the same choices with them, as far as they were timed.
    """
    headers = [*names, "µs", "±", "times as fast", "±", "", "with command buffers", "±"]
    rows: list[list[Cell]] = []
    for each in compared:
        other = (in_command_buffers or {}).get(each.choice)
        is_plain = each is compared[0]
        times: list[Cell] = [each.us.mean, each.us.half, each.speedup.mean, each.speedup.half]
        with_buffers: list[Cell] = [None, None] if other is None else [other.speedup.mean, other.speedup.half]
        verdict = "baseline" if is_plain else each.verdict
        rows.append([*map(_text, each.choice), *times, verdict, *with_buffers])
    return format_table(headers, rows)


def _text(prefetch: Prefetch) -> str:
    ratios = [ratio for ratio in (prefetch.overlap, prefetch.prefetch) if ratio is not None]
    return " ".join([prefetch.mode, *(f"{ratio:g}" for ratio in ratios)])


def _record(links: Mapping[str, Link], each: Comparison, other: Comparison | None) -> dict[str, Any]:
    values = {name: dataclasses.asdict(value) for name, value in zip(links, each.choice, strict=True)}
    return {"prefetch": values, **_figures(each), "in_command_buffers": None if other is None else _figures(other)}


def _figures(each: Comparison) -> dict[str, Any]:
    return {
        "us": each.us.mean,
        "us_ci95": _bounds(each.us),
        "speedup": each.speedup.mean,
        "speedup_ci95": _bounds(each.speedup),
        "verdict": each.verdict,
    }


def _bounds(interval: Interval) -> list[float]:
    half = interval.half or 0.0
    return [interval.mean - half, interval.mean + half]

"""The options of `bench.comm`, and which of them go together."""

import argparse
import dataclasses
from collections.abc import Sequence

from bench.command import values
from bench.command.parser import make_parser
from bench.command.processes import add_process_options
from bench.command.values import NAMES, POSITIVE_INTS, positive_int
from bench.one_chip.cases import LOADS
from bench.one_chip.options import add_load_options
from moejax import PRESETS, MoEConfig, get_preset
from moejax.config import PRECISIONS
from moejax.routers.top_k import TopKRouter
from sharding.exchange.pick import on_one_axis
from sharding.placement import Placement

_TOKENS, _QUICK_TOKENS = (1, 16, 128, 1024, 4096), (1, 128)
_QUICK_LOADS = ("balanced", "text")
_REPEATS, _QUICK_REPEATS = 10, 3

_EXAMPLES = (
    "",
    "--ep 8 --quick",
    "--tokens 128 --tokens 4096 --load text --transport dense,ragged --json comm.json",
    "--model qwen3-235b-a22b --precision w16a16 --out results",
    "--tokens 128 --load text --with-layer",
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
      ValueError: one is wrong, or they do not go together.
    """
    args = _parser().parse_args(argv)
    args.tokens = _distinct(args.tokens) or list(_QUICK_TOKENS if args.quick else _TOKENS)
    args.load = _distinct(args.load) or list(_QUICK_LOADS if args.quick else LOADS)
    args.transport = _distinct(args.transport) or on_one_axis()
    args.repeats = args.repeats or (_QUICK_REPEATS if args.quick else _REPEATS)
    for option, given, known in (("load", args.load, LOADS), ("transport", args.transport, on_one_axis())):
        if strangers := [name for name in given if name not in known]:
            raise ValueError(f"--{option} must be some of {', '.join(known)}, got {strangers[0]!r}")
    layer = layer_of(args)
    if args.ep is not None:
        check_ep(args.ep, layer, f"--ep {args.ep}")
    return args


def check_ep(ep: int, layer: MoEConfig, found: str) -> None:
    """Raises ValueError where ep chips cannot share the experts of a layer, or have nothing to exchange."""
    Placement(layer.num_experts, ep)
    if ep < 2:
        raise ValueError(f"an exchange needs two devices at least, got {found}; --ep 8 makes virtual ones on a CPU")


def layer_of(args: argparse.Namespace) -> MoEConfig:
    """The layer whose tokens move, with a plain top-k and no shared expert: the loads choose.

    Raises:
      ValueError: its sizes make no sense.
    """
    given = {"hidden_size": args.hidden, "top_k": args.top_k, "num_experts": args.experts}
    sizes = {name: value for name, value in given.items() if value is not None}
    preset = get_preset(args.model, precision=args.precision)
    return dataclasses.replace(preset, router=TopKRouter(), shared_intermediate_size=0, shared_gate=False, **sizes)


def _distinct[Value](given: list[Value] | None) -> list[Value]:
    return list(dict.fromkeys(given or ()))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.comm",
        "Times what carries tokens to the chips of their experts and back, without the experts: every transport, and "
        "bare collectives beside them. Wall time of a call in a chain of calls within one program; each result is "
        "checked. The exit status is 1 if one is wrong or missing.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--ep", type=positive_int, metavar="N", help="chips (default: all devices; 8 virtual ones on a CPU)")
    tokens = ",".join(map(str, _TOKENS))
    add(
        "--tokens",
        type=POSITIVE_INTS,
        action="extend",
        metavar="N,...",
        help=f"tokens of a chip, repeatable (default {tokens})",
    )
    add("--load", type=NAMES, action="extend", metavar="NAME,...", help="repeatable (default balanced,zipf,text)")
    add_load_options(parser)
    names = ", ".join(on_one_axis())
    add("--transport", type=NAMES, action="extend", metavar="NAME,...", help=f"of {names}; repeatable (default all)")
    add("--model", default="deepseek-v3", help=f"whose sizes: one of {', '.join(PRESETS)} (default deepseek-v3)")
    add("--hidden", type=positive_int, metavar="N", help="width of a token in place of the model's")
    add("--top-k", type=positive_int, metavar="N", help="choices of a token in place of the model's")
    add("--experts", type=positive_int, metavar="N", help="experts in place of the model's")
    rules = "; ".join(f"{name}: {what}" for name, what in PRECISIONS.items())
    add("--precision", default="w8a8", help=f"{rules} (default w8a8)")
    add(
        "--reduce",
        type=positive_int,
        metavar="N",
        help="divide the widths by N (default 1; 8 on virtual devices, unless --hidden is given)",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{len(_QUICK_TOKENS)} sizes, {len(_QUICK_LOADS)} loads, {_QUICK_REPEATS} repeats",
    )
    add("--chain", type=positive_int, metavar="N", help="calls in one program (default 16; 2 on virtual devices)")
    add("--repeats", type=values.whole_number(2), metavar="N", help=f"of each measurement (default {_REPEATS})")
    add("--with-layer", action="store_true", help="also the whole layer, and the layer of one chip by itself")
    add(
        "--timeout",
        type=values.positive_float,
        default=300.0,
        metavar="SECONDS",
        help="end with an error when a step (compiling counts) takes longer (default 300)",
    )
    add("--seed", type=values.seed_number, default=0, help="of tokens, choices and weights (default 0)")
    add("--json", type=values.output_file, metavar="FILE", help="write the records, - for standard output only")
    add("--out", type=values.output_folder, metavar="DIR", help="append the records to DIR/comm.jsonl, for bench.plot")
    add("--commit", help="the commit to record (default: what git says)")
    add_process_options(parser)
    return parser

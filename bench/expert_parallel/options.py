"""The options of `bench.decode`, and which of them go together."""

import argparse
from collections.abc import Sequence

from bench.command.parser import make_parser
from bench.command.processes import add_process_options
from bench.command.values import POSITIVE_INTS, natural_int, output_file, positive_float, positive_int, seed_number
from moejax import PRESETS, MoEConfig
from moejax.config import PRECISIONS
from pallas_kernels.chips import CHIPS, get_chip
from sharding.exchange.pick import on_one_axis
from sharding.placement import Placement

_EXAMPLES = (
    "--ep 32",
    "--ep 8 --model mixtral-8x7b --batch 512 --precision w16a16",
    "--ep 32 --chip v6e --input book.txt --json -",
    "--model deepseek-v3.2 --layers all --chip v32-run --model-only --json -",
    "--model qwen3-235b-a22b --ep 16 --chip h200 --batch 64,256,1024 --kv-len 1024,8192 --layers all --model-only",
    "--ep 32 --coordinator 10.0.0.1:1234 --num-processes 4 --process-id 0   (on a cluster without auto-detection)",
)

_OF_A_RUN = (
    *("input", "capacity_factor", "reduce", "backend", "transport", "seed", "spare_slots"),
    *("coordinator", "num_processes", "process_id"),
)

_MOST_TOKENS = 1 << 20
"""Of a chip, in DS_TPU's model: its search of tiles takes a second or so for as many, and minutes for more."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
      ValueError: one is wrong, or is not heeded by the kind of run that is asked for.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    args.batch, args.kv_len = (list(dict.fromkeys(values)) for values in (args.batch, args.kv_len))
    given = {name for name in vars(args) if getattr(args, name) != parser.get_default(name)}
    several = [name for name in ("batch", "kv_len") if len(getattr(args, name)) > 1]
    of_the_model = [*several, *(name for name in ("q_len", "moe_tp", "dp", "svg") if name in given)]
    if args.model_only:
        if of_a_run := [name for name in _OF_A_RUN if name in given]:
            raise ValueError(f"{_option(of_a_run[0])} is of a real run, which --model-only leaves out: drop one")
        if args.layers == "moe" and (of_steps := [*several, *(["svg"] if args.svg else [])]):
            what = "--svg is" if of_steps[0] == "svg" else f"several {_option(of_steps[0])} are"
            raise ValueError(f"{what} for steps of the whole model: add --layers all")
        if args.svg is not None and args.svg in ("-", args.json):
            raise ValueError(f"--svg must be a file of its own, got {args.svg!r}")
    elif of_the_model:
        what = f"several {_option(of_the_model[0])}" if several else _option(of_the_model[0])
        raise ValueError(f"{what} can be modelled and not run here: add --model-only")
    return args


def check_sizes(args: argparse.Namespace, config: MoEConfig) -> None:
    """Raises ValueError, in terms of options, where the sizes of a step do not fit each other."""
    Placement(config.num_experts, args.ep)  # raises
    if config.intermediate_size % args.moe_tp or config.hidden_size % args.moe_tp:
        raise ValueError(
            f"--moe-tp must divide the widths {config.intermediate_size} and {config.hidden_size} of {args.model}, got "
            f"{args.moe_tp}"
        )
    if args.spare_slots % args.ep or args.spare_slots > config.num_experts * (args.ep - 1):
        most = config.num_experts * (args.ep - 1)
        raise ValueError(f"--spare-slots must be a multiple of --ep {args.ep} up to {most}, got {args.spare_slots}")
    chips = args.ep * args.moe_tp
    if args.dp is not None and chips % args.dp:
        raise ValueError(f"--dp must divide the {chips} chips (--ep times --moe-tp), got {args.dp}")
    parts, option = (chips, "the chips, --ep times --moe-tp =") if args.dp is None else (args.dp, "--dp")
    if not args.model_only:
        option = "--ep"
    for batch in args.batch:
        if batch % parts:
            near = -(-batch // parts) * parts
            raise ValueError(f"--batch must be a multiple of {option} {parts}, got {batch}; try {near}")
    if (least := min(args.kv_len)) < args.q_len:
        raise ValueError(f"--kv-len must count the step's own tokens, --q-len {args.q_len} at least, got {least}")
    tokens = max(args.batch) * args.q_len // parts
    if get_chip(args.chip).kind == "ds_tpu" and tokens > _MOST_TOKENS:
        raise ValueError(
            f"--batch {max(args.batch)} with --q-len {args.q_len} is {tokens} tokens a chip, and DS_TPU's search of "
            f"tiles takes {_MOST_TOKENS} at the most: lower one, or take a real --chip"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench.decode",
        "Routes real text through one expert-parallel MoE layer on the devices at hand, checks it against the dense "
        "oracle, and prints modelled compute / DMA / elapsed times of every operator, and of the whole model's step.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--ep", type=positive_int, default=32, help="chips that share the experts (default 32)")
    add("--model", default="deepseek-v3", help=f"one of {', '.join(PRESETS)} (default deepseek-v3)")
    add(
        "--batch", type=POSITIVE_INTS, default=[1536], help="sequences in all (default 1536); several with --model-only"
    )
    add(
        "--kv-len",
        type=POSITIVE_INTS,
        default=[8192],
        help="tokens of each that a query may see, in the whole model's step (default 8192); several with --model-only",
    )
    add(
        "--layers",
        choices=("moe", "all"),
        default="moe",
        help="what the JSON is of: one layer of experts, or the whole model's step (default moe)",
    )
    add(
        "--chip",
        default="seed",
        help=f"chip to model: {', '.join(CHIPS)}, or cores=64,tflops=768,gbps=8601.6,link=448 (default seed)",
    )
    add("--precision", default="w8a8", help=f"{' or '.join(PRECISIONS)} (default w8a8)")
    add("--input", metavar="FILE", help="text to route (default: one that comes with Python)")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        default="evaluation.json",
        help="file for the results (default evaluation.json), - for standard output only",
    )
    add("--model-only", action="store_true", help="run nothing: seconds, no devices")
    add("--q-len", type=positive_int, default=1, help="tokens of each sequence, above 1 prefill (with --model-only)")
    add("--moe-tp", type=positive_int, default=1, help="chips that share each expert's width (with --model-only)")
    add("--dp", type=positive_int, help="groups of chips that share the batch (default all; with --model-only)")
    add(
        "--svg",
        type=output_file,
        metavar="FILE",
        help="draw tokens/s of a chip against those of a user, by batch and kv length (with --model-only --layers all; "
        "needs matplotlib: pip install -e '.[plots]')",
    )
    add(
        "--spare-slots",
        type=natural_int,
        default=0,
        metavar="N",
        help="run once more with replicas of the hottest experts in so many slots over all chips (default 0)",
    )
    add("--capacity-factor", type=positive_float, help="drop what exceeds it (default: drop nothing)")
    add("--reduce", type=positive_int, metavar="N", help="divide the widths by N (default: as memory allows)")
    add("--backend", default="auto", help="auto, xla, pallas_tpu or pallas_gpu (default auto)")
    names = ("auto", *on_one_axis())
    add("--transport", default="auto", choices=names, metavar="NAME", help=f"one of {', '.join(names)} (default auto)")
    add("--rounding", default="round", help="activated experts: round (DS_TPU) or ceil (Tier6)")
    add("--seed", type=seed_number, default=0, help="of weights, embedding and places in the text (default 0)")
    add_process_options(parser)
    return parser

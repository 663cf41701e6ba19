"""The options of `bench.decode`, and which of them go together."""

import argparse
from collections.abc import Sequence

from bench.command.parser import make_parser
from bench.command.values import POSITIVE_INTS, natural_int, output_file, positive_float, positive_int, seed_number
from moejax import PRESETS
from moejax.config import PRECISIONS
from pallas_kernels.chips import CHIPS
from sharding.exchange.pick import TRANSPORTS

_EXAMPLES = (
    "--ep 32",
    "--ep 8 --model mixtral-8x7b --batch 512 --precision w16a16",
    "--ep 32 --chip v6e --input book.txt --json -",
    "--model deepseek-v3.2 --layers all --chip v32-run --model-only --json -",
    "--model qwen3-235b-a22b --ep 16 --chip h200 --batch 64,256,1024 --kv-len 1024,8192 --model-only --svg curve.svg",
    "--ep 32 --coordinator 10.0.0.1:1234 --num-processes 4 --process-id 0   (on a cluster without auto-detection)",
)

_OF_A_RUN = (
    *("input", "capacity_factor", "reduce", "backend", "transport", "seed"),
    *("coordinator", "num_processes", "process_id"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
      ValueError: one is wrong, or is not heeded by the kind of run that is asked for.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    given = {name for name in vars(args) if getattr(args, name) != parser.get_default(name)}
    several = [name for name in ("batch", "kv_len") if len(getattr(args, name)) > 1]
    of_the_model = [*several, *(name for name in ("q_len", "moe_tp", "dp", "svg") if name in given)]
    if args.model_only:
        if of_a_run := [name for name in _OF_A_RUN if name in given]:
            raise ValueError(f"{_option(of_a_run[0])} is of a real run, which --model-only leaves out: drop one")
        if "kv_len" in several and args.layers == "moe":
            raise ValueError("--kv-len is of the whole model, not of a layer of experts: add --layers all")
    elif of_the_model:
        what = f"several {_option(of_the_model[0])}" if several else _option(of_the_model[0])
        raise ValueError(f"{what} can be modelled and not run here: add --model-only")
    return args


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
        help="tokens of each that a query may see, for the model of a "
        "whole step (default 8192); several with --model-only",
    )
    add(
        "--layers",
        choices=("moe", "all"),
        default="moe",
        help="what the results are of: one layer of experts, or the "
        "whole model's step, under the same names as DS_TPU's (default moe)",
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
    add("--dp", type=positive_int, help="groups of chips that share the batch (default --ep; with --model-only)")
    add(
        "--svg",
        type=output_file,
        metavar="FILE",
        help="draw tokens/s of a chip against tokens/s of a user, by batch and kv length (with --model-only)",
    )
    add("--capacity-factor", type=positive_float, help="drop what exceeds it (default: drop nothing)")
    add("--reduce", type=positive_int, metavar="N", help="divide the widths by N (default: as memory allows)")
    add("--backend", default="auto", help="auto, xla, pallas_tpu or pallas_gpu (default auto)")
    add("--transport", default="auto", help=f"one of auto, {', '.join(TRANSPORTS)} (default auto)")
    add("--rounding", default="round", help="activated experts: round (DS_TPU) or ceil (Tier6)")
    add("--seed", type=seed_number, default=0, help="of weights, embedding and places in the text (default 0)")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, for a run over several hosts")
    add("--num-processes", type=positive_int, metavar="N", help="processes in all")
    add("--process-id", type=natural_int, metavar="I", help="number of this process")
    return parser

"""RMSNorm alone, with the sum before it, in 8 bits and backward, ours against what XLA fuses.

Each is timed in pairs, beside the share of the memory bandwidth that its least traffic takes: operands read once and
results written once (`pallas_kernels.cost`). Sizes should be larger than caches, in which less suffices.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bench.command.parser import make_parser, run
from bench.command.values import POSITIVE_INTS, output_file, whole_number
from bench.measure.errors import relative_error
from bench.measure.samples import paired, summarise
from bench.measure.steps import Step, StepTimer
from bench.one_chip.cases import DTYPES
from bench.record.json_files import write_json
from bench.record.provenance import chip_name, provenance
from bench.record.tables import format_table
from pallas_kernels.backend import check_backend
from pallas_kernels.chips import chip_of
from pallas_kernels.cost import Cost, rms_norm_cost, rms_norm_pullback_cost
from pallas_kernels.quantize import SCALE_BLOCK, QTensor, dequantize
from pallas_kernels.rms_norm import rms_norm, rms_norm_in_8_bits

_MOST_ERROR = 0.01
"""Of ours to XLA's, by norm: roundings that fall to the other side of a tie included."""


def operators(backend: str) -> dict[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    """What is timed, by name, and the values that it takes."""
    norm = functools.partial(rms_norm, backend=backend)

    def summed(x, residual, weight):
        return norm(x, weight, residual=residual)

    def in_8_bits(x, residual, weight):
        rounded, total = rms_norm_in_8_bits(x, weight, residual=residual, backend=backend)
        return rounded.in_8_bits, total

    def backward(x, weight, dy):
        return jax.vjp(norm, x, weight)[1](dy)

    return {
        "norm": (norm, ("x", "weight")),
        "sum and norm": (summed, ("x", "residual", "weight")),
        "sum and norm, 8 bits": (in_8_bits, ("x", "residual", "weight")),
        "backward": (backward, ("x", "weight", "dy")),
    }


def least_work(tokens: int, hidden: int, dtype: str) -> dict[str, Cost]:
    """That of each of the operators."""
    cost = functools.partial(rms_norm_cost, tokens, hidden, dtype=dtype)
    return {
        "norm": cost(out_dtype=dtype),
        "sum and norm": cost(out_dtype=dtype, has_residual=True),
        "sum and norm, 8 bits": cost(out_dtype="float8_e4m3fn", has_residual=True, scales=hidden // SCALE_BLOCK),
        "backward": rms_norm_pullback_cost(tokens, hidden, dtype=dtype, out_dtype=dtype),
    }


def measure(tokens: int, hidden: int, dtype: str, backend: str, clock: StepTimer, rounds: int) -> list[dict[str, Any]]:
    """A record for each operator at one size, ours and XLA's.

    Args:
      tokens: T.
      hidden: H, a multiple of 128.
      dtype: of rows.
      backend: of ours.
      clock: measures.
      rounds: how often.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    values = {
        name: jax.random.normal(key, (tokens, hidden), dtype)
        for name, key in zip(("x", "residual", "dy"), keys, strict=False)
    }
    values["weight"] = 1 + jax.random.normal(keys[3], (hidden,))
    sides = {"ours": operators(backend), "xla": operators("xla")}
    steps = [
        Step(f"{side} {name}", function, inputs)
        for side, each in sides.items()
        for name, (function, inputs) in each.items()
    ]
    measured = clock.measure(steps, values, scope=(tokens, hidden), rounds=rounds)
    chip = chip_of(jax.devices()[0])
    records = []
    for name, work in least_work(tokens, hidden, dtype).items():
        ours, xla = (measured.samples_us[f"{side} {name}"] for side in sides)
        result, expected = (_as_arrays(measured.values[f"{side} {name}"]) for side in sides)
        floor_us = None if chip is None else work.memory_seconds(chip) * 1e6
        times = {side: summarise(samples) for side, samples in (("ours", ours), ("xla", xla))}
        record = {"operator": name, "tokens": tokens, "hidden": hidden, "dtype": dtype, "backend": backend}
        record |= {"clock": clock.name, "hbm_bytes": work.hbm_bytes, "floor_us": floor_us, "repeats": rounds}
        for side, time in times.items():
            share = None if floor_us is None else floor_us / time.mean
            record[side] = {"mean_us": time.mean, "ci95_us": list(time.ci95), "bandwidth_share": share}
        difference = paired(ours, xla)
        record |= {"ratio": difference.ratio, "difference_us": difference.mean, "ci95_us": list(difference.ci95)}
        records.append({**record, "error": relative_error(result, expected)})
    return records


def _as_arrays(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, QTensor) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )


def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints; returns 1 when a result is not XLA's."""
    parser = make_parser(
        "bench.norm",
        "Times RMSNorm alone, with the sum before it, in 8 bits and backward, against XLA's in pairs. The exit status "
        "is 1 if results differ.",
        ("", "--tokens 16384,65536 --hidden 2048,4096,7168 --json -"),
    )
    add = parser.add_argument
    add("--tokens", type=POSITIVE_INTS, metavar="N,...", default="16384", help="tokens (default %(default)s)")
    add("--hidden", type=POSITIVE_INTS, metavar="N,...", default="7168", help="width of a token (default %(default)s)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of rows (default %(default)s)")
    add("--backend", default="auto", help="auto, xla, pallas_tpu or pallas_gpu (default auto)")
    add("--repeats", type=whole_number(2), default=10, help="of each measurement (default %(default)s)")
    add("--json", type=output_file, metavar="PATH", help="write the records to PATH, - for standard output")
    add("--commit", help="the commit to record (default: what git says)")
    args = parser.parse_args(argv)
    check_backend(args.backend)
    if odd := [hidden for hidden in args.hidden if hidden % SCALE_BLOCK]:
        raise ValueError(f"--hidden must be multiples of {SCALE_BLOCK}, which a scale of 8 bits covers, got {odd[0]}")
    clock = StepTimer()
    records = [
        record
        for tokens in args.tokens
        for hidden in args.hidden
        for record in measure(tokens, hidden, DTYPES[args.dtype], args.backend, clock, args.repeats)
    ]
    if args.json is not None:
        head = provenance("bench.norm", argv, chip_name(), ("jax", "jaxlib"), args.commit)
        write_json({**head, "records": records}, args.json)
    if args.json != "-":
        print(table(records))
    return 0 if all(record["error"] < _MOST_ERROR for record in records) else 1


def table(records: Sequence[dict[str, Any]]) -> str:
    """Records for people: times, and shares of the bandwidth."""
    headers = ("operator", "T,H", "ours µs", "of bandwidth", "XLA µs", "of bandwidth", "ours / XLA", "error")
    rows = []
    for r in records:
        sides = [
            cell for side in ("ours", "xla") for cell in (r[side]["mean_us"], _percent(r[side]["bandwidth_share"]))
        ]
        rows.append([r["operator"], f"{r['tokens']},{r['hidden']}", *sides, r["ratio"], f"{r['error']:.1e}"])
    return format_table(headers, rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(run(main))

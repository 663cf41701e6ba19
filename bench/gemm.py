"""Modelled time of grouped GEMMs: `python -m bench.gemm --chip v32-run --dtype fp8 --shape 8,48,7168,2048`."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bench.cli import make_parser, run
from bench.evaluation import operator_record
from bench.report import Cell, format_table, write_json
from bench.roofline import model_gemm
from bench.workloads import OPERAND_DTYPES, GemmShape
from pallas_kernels.chips import CHIPS, Chip, get_chip


def parse_shape(text: str) -> GemmShape:
    """The shape written as "G,M,K,N".

    Raises:
      ValueError: the text is not four positive whole numbers.
    """
    try:
        shape = GemmShape(*map(int, text.split(",")))
    except (ValueError, TypeError):
        raise ValueError(
            f"--shape must be four positive whole numbers G,M,K,N like 8,48,7168,2048, got {text!r}"
        ) from None
    return shape


def gemm_record(chip: Chip, shape: GemmShape, dtype: str) -> dict[str, Any]:
    """The JSON object of one product: times in µs, traffic in bytes, tile and partition null for a roofline."""
    record = operator_record(model_gemm(chip, shape, dtype))
    times = ("elapsed", "comp_elapsed", "dma_elapsed", "dram_traffic", "best_tile", "best_partition", "urate")
    return {**record["parallel_params"], "chip": chip.name, "dtype": dtype, **{key: record[key] for key in times}}


def main(argv: Sequence[str]) -> None:
    """Parse the command line, model every shape, print a table or JSON."""
    parser = make_parser(
        "bench.gemm",
        "Model the time of grouped GEMMs C[g] = A[g] (M,K) · B[g] (K,N), g = 1..G, with a BF16 output: by the DS_TPU "
        "cost model on its chips, by a roofline on real ones.",
        (
            "--chip v32-run --dtype fp8 --shape 8,48,7168,2048",
            "--chip v32-run --dtype fp8 --shape 8,48,7168,2048 --json -",
            "--chip cores=64,tflops=768,gbps=8601.6 --dtype bf16 --shape 4,1,7168,2048 --shape 8,48,7168,2048",
            "--chip h200 --shape 8,48,7168,4096",
        ),
    )
    parser.add_argument(
        "--shape", action="append", required=True, metavar="G,M,K,N", help="a product; give it again for more"
    )
    parser.add_argument(
        "--chip",
        default="v32-run",
        help=f"{', '.join(CHIPS)}, or a description like cores=64,tflops=768,gbps=8601.6 (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", default="fp8", choices=tuple(OPERAND_DTYPES), help="of both operands (default: %(default)s)"
    )
    parser.add_argument(
        "--json", metavar="PATH", help="write JSON to PATH, - for standard output: an object, for several shapes a list"
    )
    args = parser.parse_args(argv)

    chip = get_chip(args.chip)
    records = [gemm_record(chip, parse_shape(text), args.dtype) for text in args.shape]
    if args.json is not None:
        write_json(records[0] if len(records) == 1 else records, args.json)
    if args.json != "-":
        print(f"{chip.name}, {args.dtype} operands, BF16 output")
        print(_table(records))


def _table(records: Sequence[dict[str, Any]]) -> str:
    headers = [
        "G,M,K,N",
        "comp µs",
        "dma µs",
        "elapsed µs",
        "traffic MB",
        "urate %",
        "tile M,N,K",
        "order",
        "P_G,M,N,K",
    ]
    rows: list[list[Cell]] = []
    for record in records:
        times: list[Cell] = [record["comp_elapsed"], record["dma_elapsed"], record["elapsed"]]
        choices: list[Cell] = [None, None, None]
        if tile := record["best_tile"]:
            procs = record["best_partition"]["procs"]
            choices = [_join(tile[dim] for dim in "MNK"), tile["order"], _join(procs)]
        shape = _join(record[dim] for dim in "GMKN")
        rows.append([shape, *times, record["dram_traffic"] / 1e6, record["urate"] * 100, *choices])
    return format_table(headers, rows)


def _join(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(run(main))

"""Modelled time of grouped matrix products on any chip; with --device measured on the GPU at hand as well."""

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bench.command.parser import make_parser, run
from bench.command.values import output_file
from bench.hopper.products import PRODUCT_DTYPES, Product, hopper_at_hand, make_inputs
from bench.measure.clock import copies_of
from bench.measure.overlap import OverlapTimes, measure_overlap
from bench.model.evaluation import operator_record
from bench.model.shapes import OPERAND_DTYPES, GemmShape, parse_shape, shape_text
from bench.model.times import model_gemm
from bench.record.json_files import write_json
from bench.record.tables import Cell, format_table
from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import CHIPS, Chip, get_chip

_DEFAULT_CHIP = "v32-run"
_TIMES = ("comp_elapsed", "dma_elapsed", "elapsed")


def gemm_record(chip: Chip, shape: GemmShape, dtype: str) -> dict[str, Any]:
    """The JSON object of one product: times in µs, traffic in bytes, tile and partition null for a roofline."""
    record = operator_record(model_gemm(chip, shape, dtype))
    figures = ("elapsed", "comp_elapsed", "dma_elapsed", "dram_traffic", "best_tile", "best_partition", "urate")
    return {**record["parallel_params"], "chip": chip.name, "dtype": dtype, **{key: record[key] for key in figures}}


def measure_gemm(shape: GemmShape, dtype: str) -> OverlapTimes:
    """Device time of our kernel, of its arithmetic and of its copies; 8-bit operands have row and channel scales.

    Raises:
      ValueError: the kernels do not multiply this dtype or shape.
    """
    if dtype not in PRODUCT_DTYPES:
        dtypes = ", ".join(name for name in OPERAND_DTYPES if name in PRODUCT_DTYPES)
        raise ValueError(f"--device multiplies {dtypes}, got --dtype {dtype}")
    product = Product(shape, dtype)  # type: ignore[arg-type]
    inputs = copies_of(make_inputs(product))
    try:
        return measure_overlap(lambda stage: functools.partial(product.run, stage=stage), inputs)
    except Unsupported as error:
        raise ValueError(f"--shape {product.name}: {error}") from error


def main(argv: Sequence[str]) -> None:
    """Parse the command line, model every shape, measure it if asked to, print a table or JSON."""
    parser = make_parser(
        "bench.gemm",
        "Model the time of grouped GEMMs C[g] = A[g] (M,K) · B[g] (K,N), g = 1..G, with a BF16 output: by the DS_TPU "
        "cost model on its chips, by a roofline on real ones. With --device, also measure our kernel.",
        (
            "--chip v32-run --dtype fp8 --shape 8,48,7168,2048",
            "--chip v32-run --dtype fp8 --shape 8,48,7168,2048 --json -",
            "--chip cores=64,tflops=768,gbps=8601.6 --dtype bf16 --shape 4,1,7168,2048 --shape 8,48,7168,2048",
            "--chip h200 --shape 8,48,7168,4096",
            "--device --dtype bf16 --shape 8,48,7168,2048 --shape 8,4096,7168,4096   (on an NVIDIA Hopper GPU)",
        ),
    )
    add = parser.add_argument
    add("--shape", action="append", required=True, metavar="G,M,K,N", help="a product; give it again for more")
    add(
        "--chip",
        help=f"{', '.join(CHIPS)}, or a description like cores=64,tflops=768,gbps=8601.6 (default: {_DEFAULT_CHIP}, "
        "with --device the chip at hand)",
    )
    add(
        "--device",
        action="store_true",
        help="measure the kernel, its arithmetic alone and its copies alone on the NVIDIA Hopper GPU at hand",
    )
    add("--dtype", default="fp8", choices=tuple(OPERAND_DTYPES), help="of both operands (default: %(default)s)")
    add(
        "--json",
        type=output_file,
        metavar="PATH",
        help="write JSON to PATH, - for standard output: an object, for several shapes a list",
    )
    args = parser.parse_args(argv)

    shapes = [parse_shape(text) for text in args.shape]
    at_hand = hopper_at_hand() if args.device else None
    chip = get_chip(args.chip or _DEFAULT_CHIP) if args.chip or at_hand is None else at_hand
    records = [gemm_record(chip, shape, args.dtype) for shape in shapes]
    if at_hand is not None:
        for record, shape in zip(records, shapes, strict=True):
            record["measured"] = measure_gemm(shape, args.dtype).record()
    if args.json is not None:
        write_json(records[0] if len(records) == 1 else records, args.json)
    if args.json != "-":
        print(f"{chip.name}, {args.dtype} operands, BF16 output")
        print(_table(records))
        if at_hand is not None:
            print(f"\nmeasured on {at_hand.name}, modelled for {chip.name}")
            print(_measured_table(records))


def _table(records: Sequence[dict[str, Any]]) -> str:
    figures = ["comp µs", "dma µs", "elapsed µs", "traffic MB", "urate %"]
    rows: list[list[Cell]] = []
    for record in records:
        times = [record[key] for key in _TIMES]
        choices: list[Cell] = [None, None, None]
        if tile := record["best_tile"]:
            choices = [_join(tile[dim] for dim in "MNK"), tile["order"], _join(record["best_partition"]["procs"])]
        rows.append([shape_text(record), *times, record["dram_traffic"] / 1e6, record["urate"] * 100, *choices])
    return format_table(["G,M,K,N", *figures, "tile M,N,K", "order", "P_G,M,N,K"], rows)


def _measured_table(records: Sequence[dict[str, Any]]) -> str:
    headers = ["G,M,K,N", "", "comp µs", "dma µs", "elapsed µs", "overlap"]
    rows: list[list[Cell]] = []
    for record in records:
        for name, times in (("measured", record["measured"]), ("modelled", record)):
            rows.append([shape_text(record), name, *(times[key] for key in _TIMES), times.get("overlap")])
    return format_table(headers, rows)


def _join(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(run(main))

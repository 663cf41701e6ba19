"""The DS_TPU cost model of an attention, in the manner of FlashAttention 2.

Every core takes whole caches. For each of them it multiplies in its systolic cube, then its vector unit computes the
softmax, and neither hides behind the other; both hide the traffic as in `bench.model.ds_tpu`. Queries come in tiles,
for each of which all keys and values are read again. Source: the DS_TPU evaluator.
"""

import math
from typing import NamedTuple

from bench.model.ds_tpu import (
    ALIGN_BYTES,
    CUBE_K,
    CUBE_M,
    CUBE_N,
    LANES,
    OVERLAP,
    SRAM_SHARE,
    divisors,
    up,
)
from bench.model.operator_time import AttentionTile, OperatorTime
from bench.model.shapes import OUTPUT_BYTES, AttentionShape, operand_dtype
from pallas_kernels.chips import Chip

VECTOR_LANES = 512  # of a core's vector unit, each with two operations a cycle
PAIR_OPERATIONS, ROW_OPERATIONS = 37, 41  # of a softmax, for each pair of a query and a key, and for each query
SCORE_TILES, OUTPUT_TILES = 2, 4  # that a core holds of each, in BF16


class _OneCache(NamedTuple):
    """What a core needs for one cache: µs of arithmetic and softmax, bytes, and its tile."""

    comp: float
    traffic: int
    tile: AttentionTile


def evaluate_attention(chip: Chip, shape: AttentionShape, dtype: str, name: str = "attention") -> OperatorTime:
    """Time, traffic, tile and partition of an attention on a chip of kind "ds_tpu".

    `pairs` and `latent` of the shape are not heeded: DS_TPU multiplies every row with every key and reads keys and
    values apart. `dram_occupy` is the number that DS_TPU prints: for each sequence, heads times the width of the
    product that makes their queries.

    Raises:
      ValueError: the operands' dtype is not "fp8", "int8", "bf16" or "fp16", or no tile fits the fast memory.
    """
    operand = operand_dtype(dtype)
    peak = chip.peak(operand)
    one = _one_cache(shape, operand.itemsize, chip, peak)
    parts = min(divisors(chip.cores), key=lambda parts: (math.ceil(shape.B / parts), parts))
    caches = math.ceil(shape.B / parts)  # of the core that has the most
    comp = caches * one.comp
    dma = caches * one.traffic / (chip.hbm_bandwidth / chip.cores) * 1e6
    elapsed = max(comp, dma) + (1 - OVERLAP) * min(comp, dma)
    flops = 2 * shape.B * shape.QS * shape.KS * (shape.QD + shape.VD)
    return OperatorTime(
        name=name,
        kind="attention",
        dtype=dtype,
        shape=shape,
        elapsed=elapsed,
        comp_elapsed=comp,
        dma_elapsed=dma,
        flops=flops,
        dram_traffic=shape.B * one.traffic,
        dram_occupy=shape.B * shape.QS * shape.query_width * operand.itemsize,
        urate=flops / (elapsed * 1e-6 * peak),
        best_tile=one.tile,
        best_partition=(parts,),
    )


def _one_cache(shape: AttentionShape, operand_bytes: int, chip: Chip, peak: float) -> _OneCache:
    tile = best_tile(shape, operand_bytes, int(SRAM_SHARE * chip.fast_memory_bytes))
    frequency = peak / 2 / chip.cores / (CUBE_M * CUBE_K * CUBE_N)
    rows, keys = up(shape.QS, CUBE_M), shape.KS
    scores = rows * up(shape.QD, CUBE_K) * up(keys, CUBE_N)
    outputs = rows * up(keys, CUBE_K) * up(shape.VD, CUBE_N)
    softmax = rows * (up(keys, LANES) * PAIR_OPERATIONS + ROW_OPERATIONS)
    seconds = (scores + outputs) / (peak / 2 / chip.cores) + softmax / (2 * VECTOR_LANES) / frequency
    sweeps = math.ceil(shape.QS / tile.Q)
    operands = shape.QS * shape.QD + keys * (shape.QD + shape.VD) * sweeps
    traffic = operands * operand_bytes + shape.QS * shape.VD * OUTPUT_BYTES
    return _OneCache(seconds * 1e6, traffic, tile)


def best_tile(shape: AttentionShape, operand_bytes: int, sram_limit: int) -> AttentionTile:
    """The tile with the fewest sweeps over the keys, and with the most keys among those.

    Tiles are multiples of 16 rows and keys, whose buffers Q + K + V + 2 P + 4 O fit; rows are padded to 32 bytes.

    Raises:
      ValueError: not even the smallest tile fits.
    """

    def fits(rows: int, keys: int) -> bool:
        def buffer(height: int, width: int, width_bytes: int) -> int:
            return up(height, LANES) * up(width * width_bytes, ALIGN_BYTES)

        operands = buffer(rows, shape.QD, operand_bytes) + sum(
            buffer(keys, width, operand_bytes) for width in (shape.QD, shape.VD)
        )
        scores, outputs = buffer(rows, keys, OUTPUT_BYTES), buffer(rows, shape.VD, OUTPUT_BYTES)
        return operands + SCORE_TILES * scores + OUTPUT_TILES * outputs <= sram_limit

    def largest(extent: int, fits_at) -> int:
        """The most steps of 16, as many as `extent` needs at the most, that fit: 0 where none does."""
        low, high = 0, math.ceil(extent / LANES)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits_at(middle * LANES) else (low, middle - 1)
        return low

    most_rows = largest(shape.QS, lambda rows: fits(rows, LANES)) * LANES
    if not most_rows:
        raise ValueError(f"no tile of an attention {shape} (B,QS,KS,QD,VD) fits {sram_limit} bytes of fast memory")
    sweeps = math.ceil(shape.QS / most_rows)
    rows = up(math.ceil(shape.QS / sweeps), LANES)
    return AttentionTile(rows, largest(shape.KS, lambda keys: fits(rows, keys)) * LANES)

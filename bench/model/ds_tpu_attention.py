"""The DS_TPU cost model of an attention, in the manner of FlashAttention 2.

Every core takes whole caches. For each of them it multiplies in its systolic cube, then its vector unit computes the
softmax, and neither hides behind the other; both hide the traffic as in `bench.model.ds_tpu`. Queries come in tiles,
for each of which all keys and values are read again. Source: the DS_TPU evaluator.
"""

import bisect
import math

from bench.model.ds_tpu import (
    ALIGN_BYTES,
    CUBE_K,
    CUBE_M,
    CUBE_N,
    LANES,
    OVERLAP,
    SRAM_SHARE,
    divisors,
)
from bench.model.operator_time import AttentionTile, OperatorTime
from bench.model.shapes import OUTPUT_BYTES, AttentionShape, operand_dtype, up
from pallas_kernels.chips import Chip

VECTOR_LANES = 512  # of a core's vector unit, each with two operations a cycle
PAIR_OPERATIONS, ROW_OPERATIONS = 37, 41  # of a softmax, for each pair of a query and a key, and for each query
SCORE_TILES, OUTPUT_TILES = 2, 4  # that a core holds of each, in BF16


def evaluate_attention(chip: Chip, shape: AttentionShape, dtype: str, name: str = "attention") -> OperatorTime:
    """Time, traffic, tile and partition of an attention on a chip of kind "ds_tpu".

    `pairs`, `keys` and `latent` of the shape are not heeded: DS_TPU multiplies every row with every key of its cache,
    and reads keys and values apart. `dram_occupy` is the number that DS_TPU prints: for each query row, the width of
    the product that makes the queries of all heads.

    Raises:
      ValueError: the operands' dtype is not "fp8", "int8", "bf16" or "fp16", or no tile fits the fast memory.
    """
    operand = operand_dtype(dtype)
    peak = chip.peak(operand)
    core_macs = peak / 2 / chip.cores
    frequency = core_macs / (CUBE_M * CUBE_K * CUBE_N)

    # Of one cache.
    rows = up(shape.QS, CUBE_M)
    scores = rows * up(shape.QD, CUBE_K) * up(shape.KS, CUBE_N)
    outputs = rows * up(shape.KS, CUBE_K) * up(shape.VD, CUBE_N)
    softmax = rows * (up(shape.KS, LANES) * PAIR_OPERATIONS + ROW_OPERATIONS)
    seconds = (scores + outputs) / core_macs + softmax / (2 * VECTOR_LANES) / frequency
    tile = best_tile(shape, operand.itemsize, int(SRAM_SHARE * chip.fast_memory_bytes))
    sweeps = math.ceil(shape.QS / tile.Q)
    operands = shape.QS * shape.QD + shape.KS * (shape.QD + shape.VD) * sweeps
    traffic = operands * operand.itemsize + shape.QS * shape.VD * OUTPUT_BYTES

    parts = min(divisors(chip.cores), key=lambda parts: (math.ceil(shape.B / parts), parts))
    caches = math.ceil(shape.B / parts)  # of the core that has the most
    comp = caches * (seconds * 1e6)
    dma = caches * traffic / (chip.hbm_bandwidth / chip.cores) * 1e6
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
        dram_traffic=shape.B * traffic,
        dram_occupy=shape.B * shape.QS * shape.query_width * operand.itemsize,
        urate=flops / (elapsed * 1e-6 * peak),
        best_tile=tile,
        best_partition=(parts,),
    )


def best_tile(shape: AttentionShape, operand_bytes: int, sram_limit: int) -> AttentionTile:
    """The tile with the fewest sweeps over the keys, which settle the traffic, and among those the most keys.

    Tiles are multiples of 16 rows and keys, whose buffers Q + K + V + 2 P + 4 O fit; rows are padded to 32 bytes.

    Raises:
      ValueError: not even the smallest tile fits.
    """

    def buffer(height: int, width: int, width_bytes: int) -> int:
        return height * up(width * width_bytes, ALIGN_BYTES)

    def is_too_large(rows: int, keys: int) -> bool:
        operands = buffer(rows, shape.QD, operand_bytes) + sum(
            buffer(keys, width, operand_bytes) for width in (shape.QD, shape.VD)
        )
        scores, outputs = buffer(rows, keys, OUTPUT_BYTES), buffer(rows, shape.VD, OUTPUT_BYTES)
        return operands + SCORE_TILES * scores + OUTPUT_TILES * outputs > sram_limit

    sizes_of_rows, sizes_of_keys = (range(LANES, up(extent, LANES) + 1, LANES) for extent in (shape.QS, shape.KS))
    fitting = bisect.bisect_left(sizes_of_rows, True, key=lambda rows: is_too_large(rows, LANES))
    if not fitting:
        raise ValueError(f"no tile of an attention {shape} (B,QS,KS,QD,VD) fits {sram_limit} bytes of fast memory")
    sweeps = math.ceil(shape.QS / sizes_of_rows[fitting - 1])
    rows = up(math.ceil(shape.QS / sweeps), LANES)
    fitting = bisect.bisect_left(sizes_of_keys, True, key=lambda keys: is_too_large(rows, keys))
    return AttentionTile(rows, sizes_of_keys[fitting - 1])

"""The DS_TPU cost model of a grouped GEMM, of an expert-parallel exchange, and of a lookup.

A chip is a number of equal cores, each with its share of the peak and of the DRAM bandwidth. The product is cut into
P_G × P_M × P_N × P_K blocks, one a core; a core walks its block in tiles that fit a part of its SRAM; the partition
with the least modelled time wins, and with it the tiles that move the fewest bytes. Source: the DS_TPU evaluator.

    time = evaluate_gemm(get_chip("v32-run"), GemmShape(8, 48, 7168, 2048), "fp8")
    time.elapsed, time.best_partition      # 17.96 µs, (8, 1, 2, 4)
"""

import functools
import math
from typing import Any

import numpy as np

from bench.model.operator_time import LOOP_ORDERS, ExchangeKind, LoopOrder, OperatorTime, Tile
from bench.model.shapes import OUTPUT_BYTES, GemmShape, operand_dtype, up
from pallas_kernels.chips import Chip

CUBE_M, CUBE_K, CUBE_N = 16, 32, 8  # the systolic cube; a block's extents are padded to it
LANES = 16  # rows of a tile in SRAM are padded to this
ALIGN_BYTES = 32  # and a row of the output buffer to this
SRAM_SHARE = 0.45  # of the fast memory may hold tiles, the rest hides the next ones
OVERLAP = 0.8  # share of the shorter of compute and DMA that hides behind the longer
SPILL_BYTES = 8  # a partial sum that leaves SRAM is written and read back in FP32
LINK_EFFICIENCY = 0.95
LINK_START_US = 0.59  # latency of one exchange at the default protocol

Partition = tuple[int, int, int, int]
"""(P_G, P_M, P_N, P_K): into how many parts the cores cut each dimension."""


def evaluate_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """Time, traffic, tile and partition of a grouped GEMM with a BF16 output on a chip of kind "ds_tpu".

    Of partitions with the same time that with the least traffic wins, then that with the fewest tiles.

    Raises:
      ValueError: the operands' dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    operand = operand_dtype(dtype)
    peak = chip.peak(operand)
    core_macs, core_bandwidth = peak / 2 / chip.cores, chip.hbm_bandwidth / chip.cores
    sram_limit = int(SRAM_SHARE * chip.fast_memory_bytes)

    def evaluate(partition: Partition) -> tuple[Any, OperatorTime]:
        """Its rank among the partitions, and what the chip needs with it."""
        # The first core's blocks are the largest in every dimension: it is the slowest, and its time the chip's.
        extents = shape.G, shape.M, shape.N, shape.K
        g, m, n, k = (-(-extent // parts) for extent, parts in zip(extents, partition, strict=True))
        tile, core_traffic = best_tile(m, n, k, operand.itemsize, sram_limit)
        comp = g * up(m, CUBE_M) * up(k, CUBE_K) * up(n, CUBE_N) * 1e6 / core_macs
        dma = g * core_traffic * 1e6 / core_bandwidth
        elapsed = max(comp, dma) + (1 - OVERLAP) * min(comp, dma)
        traffic = _chip_traffic(shape, (m, n, k), tile, operand.itemsize)
        num_tiles = g * math.prod(-(-extent // size) for extent, size in zip((m, n, k), _mnk(tile), strict=True))
        return (elapsed, traffic, num_tiles, partition), OperatorTime(
            name=name,
            kind="matmul",
            dtype=dtype,
            shape=shape,
            elapsed=elapsed,
            comp_elapsed=comp,
            dma_elapsed=dma,
            flops=shape.flops,
            dram_traffic=traffic,
            dram_occupy=shape.weights * operand.itemsize,
            param=shape.weights,
            urate=shape.flops / (elapsed * 1e-6 * peak),
            best_tile=tile,
            best_partition=partition,
        )

    return min(map(evaluate, partitions(chip.cores)))[1]


def evaluate_exchange(chip: Chip, kind: ExchangeKind, num_bytes: int) -> OperatorTime:
    """Time of a dispatch or combine whose payload is `num_bytes` a chip, at the default protocol.

    Raises:
      ValueError: the chip's link bandwidth is not known.
    """
    elapsed = num_bytes / (chip.link() * LINK_EFFICIENCY) * 1e6 + LINK_START_US
    return OperatorTime(name=kind, kind=kind, elapsed=elapsed, link_elapsed=elapsed, comm_size=num_bytes)


def evaluate_lookup(chip: Chip, rows: int, width: int, table: int) -> OperatorTime:
    """Time of reading `rows` rows of `width` from an embedding of `table` rows in BF16.

    Its FLOPs are those of a product with the whole table, which is what DS_TPU charges.
    """
    num_bytes = rows * width * OUTPUT_BYTES
    elapsed = num_bytes / chip.hbm_bandwidth * 1e6
    return OperatorTime(
        name="lookup",
        kind="lookup",
        elapsed=elapsed,
        dma_elapsed=elapsed,
        flops=2 * rows * width * table,
        dram_traffic=num_bytes,
        dram_occupy=table * width * OUTPUT_BYTES,
        param=table * width,
    )


@functools.lru_cache(maxsize=64)
def partitions(cores: int) -> tuple[Partition, ...]:
    """Every partition whose product is `cores`, in ascending order."""
    return tuple(
        (g, m, n, cores // (g * m * n))
        for g in divisors(cores)
        for m in divisors(cores // g)
        for n in divisors(cores // (g * m))
    )


@functools.lru_cache(maxsize=65536)
def best_tile(m: int, n: int, k: int, operand_bytes: int, sram_limit: int) -> tuple[Tile, int]:
    """The tile and loop order that move the fewest bytes for one m × n × k block, and these bytes.

    Tiles are multiples of 16 rows, 8 columns, and 32 of the contraction (or all of it, or less than 32 where no more
    fits) with (up(M, 16) + up(N, 16)) · K · operand_bytes + up(M, 16) · up(2 N, 32) ≤ sram_limit. For each number of
    row and of column tiles only the smallest size that reaches it is tried, as it leaves the most room along K, with
    the longest K that fits. Ties go to the fewest tiles, then to the first loop order.

    Raises:
      ValueError: not even the smallest tile fits.
    """
    m_tile = _tile_sizes(m, CUBE_M)[:, None]
    n_tile = _tile_sizes(n, CUBE_N)[None, :]
    output = up(m_tile, LANES) * up(n_tile * OUTPUT_BYTES, ALIGN_BYTES)
    k_fits = (sram_limit - output) // ((up(m_tile, LANES) + up(n_tile, LANES)) * operand_bytes)
    k_tile = np.where(k_fits >= k, k, np.where(k_fits >= CUBE_K, k_fits // CUBE_K * CUBE_K, k_fits))
    fits = k_tile > 0
    if not fits.any():
        raise ValueError(
            f"no tile of a block of {m} rows, {n} columns and K={k} fits {sram_limit} bytes of fast memory"
        )
    counts = (-(-m // m_tile), -(-n // n_tile), -(-k // np.maximum(k_tile, 1)))
    num_tiles = np.broadcast_to(counts[0] * counts[1] * counts[2], (len(LOOP_ORDERS), *fits.shape))
    traffic = np.stack([_traffic(order, m, n, k, counts, (1, 1, 1), operand_bytes) for order in LOOP_ORDERS])
    least = traffic.min(where=fits, initial=np.iinfo(np.int64).max)
    chosen = np.where((traffic == least) & fits, num_tiles, np.iinfo(np.int64).max).argmin()
    order, row, column = np.unravel_index(chosen, num_tiles.shape)
    tile = Tile(LOOP_ORDERS[order], int(m_tile[row, 0]), int(n_tile[0, column]), int(k_tile[row, column]))
    return tile, int(least)


def _chip_traffic(shape: GemmShape, block: tuple[int, int, int], tile: Tile, operand_bytes: int) -> int:
    """Bytes of all cores together: full blocks, and the smaller last ones, each walked in the same tiles."""
    extents = (shape.M, shape.N, shape.K)
    parts = tuple(-(-extent // size) for extent, size in zip(extents, block, strict=True))
    counts = tuple(
        extent // size * -(-size // step) + -(-(extent % size) // step)
        for extent, size, step in zip(extents, block, _mnk(tile), strict=True)
    )
    return shape.G * _traffic(tile.order, *extents, counts, parts, operand_bytes)


def _traffic(order: LoopOrder, m: int, n: int, k: int, counts, parts, operand_bytes: int):
    """Bytes that an m × n × k product moves when cut into `parts` = (P_M, P_N, P_K) blocks of `counts` tiles in all.

    "mkn" keeps A's tile over its innermost loop and so reads A once a block, "nkm" does the same with B; every other
    operand is read once for each tile across it. Unless k is innermost, each step along k but the first spills the
    partial sums. `counts` may be arrays.
    """
    m_tiles, n_tiles, k_tiles = counts
    m_parts, n_parts, k_parts = parts
    reads_of_a = n_parts if order == "mkn" else n_tiles
    reads_of_b = m_parts if order == "nkm" else m_tiles
    spills = 0 if order == "mnk" else k_tiles - k_parts
    operands = (m * k * reads_of_a + k * n * reads_of_b) * operand_bytes
    return operands + m * n * (OUTPUT_BYTES * k_parts + SPILL_BYTES * spills)


def _tile_sizes(extent: int, step: int) -> np.ndarray:
    counts = np.arange(1, -(-extent // step) + 1, dtype=np.int64)
    return np.unique(up(-(-extent // counts), step))


def divisors(number: int) -> list[int]:
    """Of a positive number, in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _mnk(tile: Tile) -> tuple[int, int, int]:
    return tile.M, tile.N, tile.K

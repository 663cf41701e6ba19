"""How the kernel cuts a product: the least modelled time.

The model adds up the steps of a block, each as long as its multiplications or its copies, and what a block takes beside
its steps. Blocks work in waves. No product is faster than the memory gives its operands, nor than it gives what all
blocks wait for at once: its latency for every so many bytes. Constants were fitted to an H200, to 151 cuts of 42
products of 8 to 512 rows: 122 are within 10 %, and the cut with the least modelled time is the fastest one measured of
all products but two (docs/results.md).
"""

import itertools
import math
from collections.abc import Iterator

from jax.experimental import pallas as pl

from pallas_kernels.chips import Chip
from pallas_kernels.cost import dense_matmul_cost
from pallas_kernels.dense_matmul.gpu.problem import BLOCK_K, BLOCK_N, Config, Problem
from pallas_kernels.dense_matmul.gpu.sizes import Sizes
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.tracing.override import Override

_ISSUE_RATE = 0.76  # share of the peak that wgmma sustains in launches too short for the limit of the chip's power
_COPY_BANDWIDTH = 140e9  # bytes/s of a block, from the cache
_MEMORY_SHARE = 0.97  # of the data sheet's bandwidth
_MEMORY_SECONDS = 1.15e-6  # from a request to its answer, when the memory is busy
_BLOCK_SECONDS = 2.1e-6  # of a block: its start, the first copies, the last store
_SUM_SECONDS = 0.6e-6  # of a cluster that adds up parts
_SENDING_BANDWIDTH = 7.6e9  # bytes/s of a warpgroup into another block
_CLUSTERED = 10 / 11  # of the multiprocessors have room for clusters of four or eight blocks: 120 of 132

_BLOCKS_N = 64, 128, 192, 256
_PARTS = 1, 2, 4, 8
_STAGES = range(3, 9)
_LEAST_STEPS = 4  # of a part
_FINISHED = 16, 32, 64, 96, 128, 192, 256  # columns that the copy engine and the sum of parts know how to lay out

forced = Override[Config]("forced_dense")
"""Products traced inside `with forced(config)` are cut as `config` says."""


def pick(chip: Chip, problem: Problem) -> Config:
    """The configuration that is modelled to be fastest; of those, one that copies least, by one warpgroup."""
    if (config := forced.get()) is not None:
        return config

    def rank(config: Config) -> tuple[float, int, int]:
        return modelled_seconds(chip, problem, config), Sizes(problem, config).step_bytes, config.warpgroups

    return min(candidates(chip, problem), key=rank)


def modelled_seconds(chip: Chip, problem: Problem, config: Config) -> float:
    """Modelled seconds of a product that is cut in this way."""
    sizes = Sizes(problem, config)
    columns, rows = sizes.grid
    room = int(chip.cores * (1 if config.parts <= 2 else _CLUSTERED)) // config.parts
    waves = pl.cdiv(columns * rows, room)
    flops = 2 * config.block_m * config.block_n * BLOCK_K
    step = max(flops / (chip.peak(problem.dtype) / chip.cores * _ISSUE_RATE), sizes.step_bytes / _COPY_BANDWIDTH)
    cost = dense_matmul_cost(
        problem.rows,
        problem.depth,
        problem.columns,
        dtype=problem.dtype,
        gated=problem.windows == 2,
        has_residual=problem.adds,
    )
    # Tiles along the rows ask for the same of rhs.
    asked_at_once = min(columns, room / rows) * config.parts * config.num_stages * sizes.rhs_bytes
    memory = max(cost.memory_seconds(chip) / _MEMORY_SHARE, problem.rhs_bytes / asked_at_once * _MEMORY_SECONDS)
    beside = _BLOCK_SECONDS
    if config.parts > 1:
        beside += _SUM_SECONDS + sizes.sent_bytes / config.warpgroups / _SENDING_BANDWIDTH
    return max(waves * pl.cdiv(problem.steps, config.parts) * step, memory) + waves * beside


def candidates(chip: Chip, problem: Problem) -> Iterator[Config]:
    """Configurations that the kernel can do, with as many stages as fit."""
    for block_n, parts, warpgroups in itertools.product(_BLOCKS_N, _PARTS, (1, 2)):
        sizes = Sizes(problem, Config(block_n, 1, parts, warpgroups))
        stages = min(max(_STAGES), (chip.fast_memory_bytes - sizes.other_bytes) // sizes.stage_bytes)
        has_work = parts == 1 or problem.steps >= parts * _LEAST_STEPS
        can_be = sizes.tile_columns % BLOCK_N == 0 and sizes.finished_columns in _FINISHED and stages in _STAGES
        if has_work and can_be and _is_right_height(chip, sizes):
            yield Config(block_n, stages, parts, warpgroups)


def _is_right_height(chip: Chip, sizes: Sizes) -> bool:
    """Tiles of 128 rows for more than 64; of 64 for no more, or where all are multiplied at once."""
    if sizes.config.warpgroups > 1:
        return sizes.problem.rows > WGMMA_ROWS
    return sizes.problem.rows <= WGMMA_ROWS or math.prod(sizes.grid) * sizes.config.parts <= chip.cores

"""How the kernel cuts a product: the least modelled time.

The model adds up the steps of a block, each as long as its multiplications or its copies, and what a block takes beside
its steps. Blocks work in waves. No product is faster than the memory's bandwidth gives its operands, nor than its
latency allows: what the rings of all blocks hold of rhs is asked for at once, and comes once in 1.15 µs.

Constants were fitted to cuts of 43 products of 8 to 512 rows on an H200 (docs/results.md). Of 140 cuts that can be
taken 115 are within 10 %. The one with the least modelled time was the fastest one measured of 39 products, took 1, 3
and 11 % longer of three, and was not measured of one. More rows are extrapolated.
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

_ISSUE_RATE = 0.76  # share of the peak that wgmma sustains, with all that a step waits for
_COPY_BANDWIDTH = 140e9  # bytes/s of a block, from the cache
_MEMORY_SHARE = 0.97  # of the data sheet's bandwidth; long kernels reach 0.96
_MEMORY_SECONDS = 1.15e-6  # from a request to its answer, when the memory is busy
_BLOCK_SECONDS = 2.1e-6  # of a block: its start, the first copies, the last store
_SUM_SECONDS = 0.6e-6  # of a cluster that adds up parts
_SENDING_BANDWIDTH = 7.6e9  # bytes/s of a warpgroup into another block
_CLUSTERED = 10 / 11  # of the multiprocessors have room for clusters of four or eight blocks: 120 of 132

_BLOCKS_M = 64, 128
_BLOCKS_N = 64, 128, 192, 256
_PARTS = 1, 2, 4, 8
_STAGES = range(3, 9)
_LEAST_STEPS = 4  # of a part
_FINISHED = 16, 32, 64, 96, 128, 192, 256  # columns that the copy engine and the sum of parts know how to lay out

forced = Override[Config]("forced_dense")
"""Products traced inside `with forced(config)` are cut as `config` says."""


def pick(chip: Chip, problem: Problem) -> Config:
    """The configuration that is modelled to be fastest; of equals, that whose blocks copy least in a step."""
    if (config := forced.get()) is not None:
        return config

    def rank(config: Config) -> tuple[float, int, int]:
        return modelled_seconds(chip, problem, config), Sizes(problem, config).step_bytes, config.block_m

    return min(candidates(chip, problem), key=rank)


def modelled_seconds(chip: Chip, problem: Problem, config: Config) -> float:
    """Modelled seconds of a product that is cut in this way."""
    sizes = Sizes(problem, config)
    waves = _waves(chip, sizes)
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
    across, down = sizes.grid
    # Tiles below each other ask for the same of rhs.
    bytes_in_flight = min(across, _room(chip, config) / down) * config.parts * config.num_stages * sizes.step_rhs_bytes
    memory = max(cost.memory_seconds(chip) / _MEMORY_SHARE, problem.rhs_bytes / bytes_in_flight * _MEMORY_SECONDS)
    beside = _BLOCK_SECONDS
    if config.parts > 1:
        beside += _SUM_SECONDS + sizes.sent_bytes / config.warpgroups / _SENDING_BANDWIDTH
    return max(waves * pl.cdiv(problem.steps, config.parts) * step, memory) + waves * beside


def candidates(chip: Chip, problem: Problem) -> Iterator[Config]:
    """Configurations that the kernel can do, with as many stages as fit."""
    for block_m, block_n, parts in itertools.product(_BLOCKS_M, _BLOCKS_N, _PARTS):
        sizes = Sizes(problem, Config(block_m, block_n, 1, parts))
        stages = min(max(_STAGES), (chip.fast_memory_bytes - sizes.other_bytes) // sizes.stage_bytes)
        has_work = parts == 1 or problem.steps >= parts * _LEAST_STEPS
        can_be = sizes.tile_columns % BLOCK_N == 0 and sizes.finished_columns in _FINISHED and stages in _STAGES
        if has_work and can_be and _has_fit_height(chip, sizes):
            yield Config(block_m, block_n, stages, parts)


def _has_fit_height(chip: Chip, sizes: Sizes) -> bool:
    """Whether tiles are 64 rows high for at most 64, and for more only where they make one wave.

    In two, 128 by 4096 by 2 × 14336 took 63.8 µs, with tiles of 128 rows 57.2.
    """
    if sizes.problem.rows <= WGMMA_ROWS:
        return sizes.config.block_m == WGMMA_ROWS
    return sizes.config.block_m > WGMMA_ROWS or _waves(chip, sizes) == 1


def _waves(chip: Chip, sizes: Sizes) -> int:
    """Rounds in which all tiles are multiplied."""
    return pl.cdiv(math.prod(sizes.grid), _room(chip, sizes.config))


def _room(chip: Chip, config: Config) -> int:
    """Tiles that are multiplied at once."""
    return int(chip.cores * (1 if config.parts <= 2 else _CLUSTERED)) // config.parts

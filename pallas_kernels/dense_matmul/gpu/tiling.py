"""How the kernel cuts a product: the least modelled time.

The model adds up the steps of a block, each as long as its multiplications, or where K is cut in parts as its copies
from the cache if these take longer, and what a block takes beside its steps. Blocks work in waves; no product is faster
than the memory. Constants were fitted to an H200, where the model is within 10 % of most cuts of products of 256 to
1024 rows, and names the fastest one for each.
"""

import itertools
from collections.abc import Iterator

from pallas_kernels.chips import Chip
from pallas_kernels.cost import dense_matmul_cost
from pallas_kernels.dense_matmul.gpu.problem import BLOCK_K, BLOCK_M, BLOCK_N, Config, Problem
from pallas_kernels.dense_matmul.gpu.sizes import Sizes
from pallas_kernels.tracing.override import Override

_ISSUE_RATE = 0.88  # share of the peak that wgmma sustains in launches too short for the limit of the chip's power
_CACHE_BANDWIDTH = 2.8  # of the cache, in multiples of the memory's, where neighbours read different parts of K
_BLOCK_SECONDS = 3.6e-6  # of a block: its start, the first copies, the last store
_SENDING_BANDWIDTH = 16e9  # bytes/s of a block
_CLUSTERED = 10 / 11  # of the multiprocessors have room for clusters of four or eight blocks: 120 of 132

_BLOCKS_N = 64, 128, 192, 256
_PARTS = 1, 2, 4, 8
_STAGES = range(3, 9)
_LEAST_STEPS = 4  # of a part
_FINISHED = 16, 32, 64, 96, 128, 192, 256  # columns that the copy engine and the sum of parts know how to lay out

forced = Override[Config]("forced_dense")
"""Products traced inside `with forced(config)` are cut as `config` says."""


def pick(chip: Chip, problem: Problem) -> Config:
    """The configuration that is modelled to be fastest."""
    if (config := forced.get()) is not None:
        return config
    return min(candidates(chip, problem), key=lambda config: modelled_seconds(chip, problem, config))


def modelled_seconds(chip: Chip, problem: Problem, config: Config) -> float:
    """Modelled seconds of a product that is cut in this way."""
    sizes = Sizes(problem, config)
    room = int(chip.cores * (1 if config.parts <= 2 else _CLUSTERED)) // config.parts
    waves = -(-sizes.grid[0] * sizes.grid[1] // room)
    step = 2 * BLOCK_M * config.block_n * BLOCK_K / (chip.peak(problem.dtype) / chip.cores * _ISSUE_RATE)
    if config.parts > 1:
        step = max(step, sizes.stage_bytes / (_CACHE_BANDWIDTH * chip.hbm_bandwidth / chip.cores))
    steps = -(-problem.steps // config.parts)
    cost = dense_matmul_cost(
        problem.rows,
        problem.depth,
        problem.columns,
        dtype=problem.dtype,
        gated=problem.windows == 2,
        has_residual=problem.adds,
    )
    beside = _BLOCK_SECONDS + sizes.sent_bytes / _SENDING_BANDWIDTH
    return max(waves * steps * step, cost.memory_seconds(chip)) + waves * beside


def candidates(chip: Chip, problem: Problem) -> Iterator[Config]:
    """Configurations that the kernel can do, with as many stages as fit."""
    for block_n, parts in itertools.product(_BLOCKS_N, _PARTS):
        sizes = Sizes(problem, Config(block_n, 1, parts))
        stages = min(max(_STAGES), (chip.fast_memory_bytes - sizes.other_bytes) // sizes.stage_bytes)
        has_work = parts == 1 or problem.steps >= parts * _LEAST_STEPS
        can_be = sizes.tile_columns % BLOCK_N == 0 and sizes.finished_columns in _FINISHED and stages in _STAGES
        if has_work and can_be:
            yield Config(block_n, stages, parts)

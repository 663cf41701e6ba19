"""How the kernel cuts a product: the least modelled time.

The model takes the larger of the multiplications and of the copies from the cache, step by step, and adds what a block
takes beside its steps; no product is faster than the memory delivers the weights. Constants were fitted to an H200.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from pallas_kernels.chips import Chip
from pallas_kernels.dense_matmul.gpu.sizes import BLOCK_K, BLOCK_M, Config, Sizes

_ISSUE_RATE = 0.88  # share of the peak that wgmma sustains
_PARTS_BANDWIDTH = 2.8  # of the cache, in the memory's, where neighbours read other parts of K; more where the same
_BLOCK_SECONDS = 3.6e-6  # of a block: its start, the first copies, the last store
_SENDING_BANDWIDTH = 16e9  # bytes/s of a block
_CLUSTERED_CORES = 10 / 11  # of the multiprocessors have room for clusters of more than two blocks

_BLOCKS_N = 64, 128, 192, 256
_PARTS = 1, 2, 4, 8
_STAGES = range(3, 9)
_LEAST_STEPS = 4  # of a part
_PIECES = 16, 32, 64, 96, 128, 192, 256  # columns that a block finishes, laid out as the copy engine and stores can


def pick(chip: Chip, sizes: Sizes) -> Sizes:
    """`sizes` with the configuration that is modelled to be fastest."""
    return min(candidates(chip, sizes), key=lambda sizes: modelled_seconds(chip, sizes))


def modelled_seconds(chip: Chip, sizes: Sizes) -> float:
    """Modelled seconds of a product cut in this way."""
    config = sizes.config
    blocks = sizes.grid[0] * sizes.grid[1] * config.parts
    room = chip.cores * (1 if config.parts <= 2 else _CLUSTERED_CORES) // config.parts * config.parts
    waves = -(-blocks // room)
    multiply = 2 * BLOCK_M * config.block_n * BLOCK_K / (chip.peak(sizes.dtype) / chip.cores * _ISSUE_RATE)
    copy = sizes.stage_bytes / (_PARTS_BANDWIDTH * chip.hbm_bandwidth / chip.cores) if config.parts > 1 else 0
    steps = -(-sizes.steps // config.parts) * max(multiply, copy)
    weights = sizes.depth * sizes.columns * sizes.windows * sizes.dtype.itemsize / chip.hbm_bandwidth
    return max(waves * steps, weights) + waves * (_BLOCK_SECONDS + sizes.sent_bytes / _SENDING_BANDWIDTH)


def candidates(chip: Chip, sizes: Sizes) -> Iterator[Sizes]:
    """Configurations that the kernel can do, with as many stages as fit."""
    for block_n, parts in itertools.product(_BLOCKS_N, _PARTS):
        one_stage = dataclasses.replace(sizes, config=Config(block_n, 1, parts))
        stages = min(max(_STAGES), (chip.fast_memory_bytes - one_stage.other_bytes) // one_stage.stage_bytes)
        has_work = parts == 1 or sizes.steps >= parts * _LEAST_STEPS
        can_be = one_stage.width % BLOCK_K == 0 and one_stage.piece in _PIECES and stages in _STAGES
        if has_work and can_be:
            yield dataclasses.replace(one_stage, config=dataclasses.replace(one_stage.config, num_stages=stages))

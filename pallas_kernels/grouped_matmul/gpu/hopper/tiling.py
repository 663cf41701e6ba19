"""How the Hopper kernels cut their work: as was measured to be best (see `tuned_table`), else by modelled time.

For each candidate the model adds up what a block does for its tiles: the larger of the multiplications and the copies
from the cache into shared memory, step by step, then finishing the tile. Blocks work in waves; no wave is faster than
the memory delivers the weights. Constants were fitted to an H200.

The largest tiles of 16 bits are bound by the chip's power. They go out at once, for which their ring leaves room, and
in strips of 4 column tiles (docs/results.md). Of operands in 8 bits tiles that go out at once were slower, and strips
of 4 were hardly measured.
"""

from collections.abc import Iterator

from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul.gpu.hopper.block import FEW_SIZES, MOST_COPIED_SIZES
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config, Problem
from pallas_kernels.grouped_matmul.gpu.hopper.tuned_table import Key, tuned_configs
from pallas_kernels.on_gpu.prefetch import with_prefetch
from pallas_kernels.on_gpu.smem import SWIZZLE
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.quantize import SCALE_BLOCK
from pallas_kernels.tracing.override import Override

_ISSUE_RATE = 0.75  # share of the peak that wgmma sustains
_CACHE_BANDWIDTH = 1.25  # of the cache, in multiples of the memory's
_FINISH_SECONDS = 0.6e-6  # of a tile: the end of its pipeline, epilogue, first store
_RESERVED_BYTES = 5 * 1024  # barriers, scales of rows, columns and an FP8 result, and bias: at most 1 KiB each
_MAX_STAGES = 12
_OUT_SLOTS = 2
_LARGEST_TILE = (128, 256)

forced = Override[Config]("forced")
"""Kernels traced inside `with forced(config)` are cut as `config` says."""


def pick(chip: Chip, problem: Problem) -> Config:
    """The configuration for the problem: as it was measured, where the chip has a table that says so, else modelled."""
    return with_prefetch(_pick(chip, problem))


def _pick(chip: Chip, problem: Problem) -> Config:
    if (config := forced.get()) is not None:
        return config
    tuned = tuned_configs(chip.name).get(Key.of(problem))
    if tuned is not None and fits(chip, problem, tuned):
        return tuned
    return min(candidates(chip, problem), key=lambda config: modelled_seconds(chip, problem, config))


def modelled_seconds(chip: Chip, problem: Problem, config: Config) -> float:
    """Modelled seconds, with rows spread evenly over the groups."""
    num_groups = min(problem.num_groups, problem.num_rows)
    steps = -(-problem.depth * problem.itemsize // SWIZZLE)
    tiles = num_groups * -(-problem.rows // config.block_m) * -(-problem.columns // config.block_n)
    waves = -(-tiles // chip.cores)
    flops = 2 * config.block_m * config.block_n * SWIZZLE // problem.itemsize
    multiply = flops / (chip.peak(problem.operand) / chip.cores * _ISSUE_RATE)
    copy = (config.block_m + config.block_n) * SWIZZLE / (_CACHE_BANDWIDTH * chip.hbm_bandwidth / chip.cores)
    # With two math warpgroups one multiplies while the other finishes; one alone leaves the tensor cores idle.
    finish = _FINISH_SECONDS * (0.5 if config.warpgroups > 1 else 1) * config.block_n / 128
    weights = num_groups * problem.depth * problem.columns * problem.itemsize / chip.hbm_bandwidth
    return max(waves * (steps * max(multiply, copy) + finish), weights * (1 + 0.02 * (config.block_n < 128)))


def candidates(chip: Chip, problem: Problem) -> Iterator[Config]:
    """One configuration for each size of a tile that the kernel can do, with as many stages as fit."""
    for block_m, warpgroups in ((64, 1), (64, 2), (128, 2)):
        for block_n in (64, 128, 192, 256):
            column_tiles = -(-problem.columns // block_n)
            out_slots, strip = _OUT_SLOTS, column_tiles
            if (block_m, block_n) == _LARGEST_TILE and problem.itemsize == 2:
                out_slots, strip = _out_parts(block_n, problem), min(4, column_tiles)
            elif block_m > WGMMA_ROWS:
                strip = min(8, column_tiles)
            stage_bytes, other_bytes = _shared_memory(block_m, block_n, warpgroups, out_slots, problem)
            stages = min(_MAX_STAGES, (chip.fast_memory_bytes - other_bytes) // stage_bytes)
            config = Config(block_m, block_n, stages, warpgroups, strip, out_slots=out_slots)
            if fits(chip, problem, config):
                yield config


def fits(chip: Chip, problem: Problem, config: Config) -> bool:
    """Whether the kernel can do `config`: its tiles divide among the warpgroups, its buffers fit the chip."""
    if (config.block_m, config.warpgroups) not in ((64, 1), (64, 2), (128, 2)) or config.block_n > 256:
        return False
    if config.num_stages < 2 or min(config.strip, config.out_slots) < 1:
        return False
    width = config.block_n // 2 if problem.fused else config.block_n
    if width // config.column_groups % 64 or (problem.result_in_8_bits and SCALE_BLOCK % width):
        return False
    # The sums and a part that is not scaled yet are in the registers together.
    most_columns = 192 if config.warpgroups > 1 else 128
    if problem.block_scales and config.block_n // config.column_groups > most_columns:
        return False
    stage_bytes, other_bytes = _shared_memory(
        config.block_m, config.block_n, config.warpgroups, config.out_slots, problem
    )
    return config.num_stages * stage_bytes + other_bytes <= chip.fast_memory_bytes


def _out_parts(block_n: int, problem: Problem) -> int:
    """How many parts of 128 bytes a row of a tile of the result has, in 16 bits."""
    return block_n // (2 if problem.fused else 1) * 2 // SWIZZLE


def _shared_memory(block_m: int, block_n: int, warpgroups: int, out_slots: int, problem: Problem) -> tuple[int, int]:
    """Bytes of a stage, and of all that is not in stages."""
    stage = (block_m + block_n) * SWIZZLE + problem.block_scales * 4 * (block_m + 32)
    column_groups = warpgroups * WGMMA_ROWS // block_m
    staged_row = SCALE_BLOCK // column_groups if problem.result_in_8_bits else SWIZZLE
    sizes = 4 * MOST_COPIED_SIZES if problem.num_groups > FEW_SIZES else 0
    return stage, warpgroups * out_slots * WGMMA_ROWS * staged_row + sizes + _RESERVED_BYTES

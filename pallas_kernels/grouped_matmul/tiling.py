"""How the Hopper kernels cut their work, by modelled time.

For each candidate the model adds up what a block does for its tiles: the larger of the multiplications and the copies
from the cache into shared memory, step by step, then finishing the tile. Blocks work in waves; no wave is faster than
the memory delivers the weights. Constants were fitted to an H200.
"""

from collections.abc import Iterator

from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul.hopper import SCALE_BLOCK, Config
from pallas_kernels.grouped_matmul.hopper_smem import SWIZZLE

_ISSUE_RATE = 0.75  # share of the peak that wgmma sustains
_CACHE_BANDWIDTH = 1.25  # of the cache, in multiples of the memory's
_FINISH_SECONDS = 0.6e-6  # of a tile: the end of its pipeline, epilogue, first store
_RESERVED_BYTES = 4 * 1024  # barriers, scales and bias
_MAX_STAGES = 12


def pick(
    chip: Chip,
    *,
    num_rows: int,
    num_groups: int,
    depth: int,
    columns: int,
    operand: str,
    out_itemsize: int,
    block_scales: bool,
    fused: bool,
) -> Config:
    """The configuration with the least modelled time for rows spread evenly over the groups.

    Args:
      chip: a Hopper.
      num_rows: M.
      num_groups: G.
      depth: K.
      columns: columns of rhs.
      operand: dtype of the operands.
      out_itemsize: bytes of an element of the result.
      block_scales: whether scales come every 128 of K.
      fused: whether gate and up are multiplied together.
    """
    candidates = list(_candidates(chip, out_itemsize, block_scales, fused, columns))
    rows = max(1, -(-num_rows // num_groups))

    def seconds(config: Config) -> float:
        return modelled_seconds(
            chip, config, rows=rows, num_groups=min(num_groups, num_rows), depth=depth, columns=columns, operand=operand
        )

    return min(candidates, key=seconds)


def modelled_seconds(
    chip: Chip, config: Config, *, rows: int, num_groups: int, depth: int, columns: int, operand: str
) -> float:
    """Time of a product of `num_groups` groups of `rows` rows each."""
    itemsize = 1 if "float8" in operand else 2
    steps = -(-depth * itemsize // SWIZZLE)
    tiles = num_groups * -(-rows // config.block_m) * -(-columns // config.block_n)
    waves = -(-tiles // chip.cores)
    flops = 2 * config.block_m * config.block_n * SWIZZLE // itemsize
    multiply = flops / (chip.peak(operand) / chip.cores * _ISSUE_RATE)
    copy = (config.block_m + config.block_n) * SWIZZLE / (_CACHE_BANDWIDTH * chip.hbm_bandwidth / chip.cores)
    # With two math warpgroups one multiplies while the other finishes; one alone leaves the tensor cores idle.
    finish = _FINISH_SECONDS * (0.5 if config.warpgroups > 1 else 1) * config.block_n / 128
    weights = num_groups * depth * columns * itemsize / chip.hbm_bandwidth
    return max(waves * (steps * max(multiply, copy) + finish), weights * (1 + 0.02 * (config.block_n < 128)))


def _candidates(chip: Chip, out_itemsize: int, block_scales: bool, fused: bool, columns: int) -> Iterator[Config]:
    for warpgroups in (1, 2):
        for block_n in (64, 128, 256):
            width = block_n // 2 if fused else block_n
            out_chunk = SWIZZLE // out_itemsize
            if width % max(SCALE_BLOCK if block_scales else 64, out_chunk):
                continue
            stage_bytes = (64 * warpgroups + block_n) * SWIZZLE + block_scales * 4 * (64 * warpgroups + 32)
            staging = warpgroups * 2 * 64 * SWIZZLE
            stages = min(_MAX_STAGES, (chip.fast_memory_bytes - staging - _RESERVED_BYTES) // stage_bytes)
            column_tiles = -(-columns // block_n)
            strip = column_tiles if warpgroups == 1 else min(8, column_tiles)
            yield Config(64 * warpgroups, block_n, stages, warpgroups, strip)

"""How the TPU kernels cut their work: the configuration of least modelled time that fits VMEM.

The model adds up, over the weight tiles of a group, the larger of what the matrix unit needs for the group's rows
and what memory needs to deliver the weights and rows. The matrix unit takes rows at its peak while the next weights are
loaded into it, and waits for those where a chunk has few rows. The constants were fitted to the cycles that libtpu
0.0.52 schedules (`bench.cycles`, instructions; within a sixth from 16 to 512 rows of a group), not to a measurement.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import MIB, Chip
from pallas_kernels.grouped_matmul.tpu.memory import Config, chunk_lengths
from pallas_kernels.tracing.override import Override

LANES = 128
_SUBLANES = 8  # rows of float32 that a register holds
_VMEM_SHARE = 0.9  # of VMEM for one kernel
_INTERNAL_BYTES = 2 * MIB  # for what the compiler keeps there besides
_LOAD_ROWS, _NARROW_LOAD_ROWS = 128, 32  # rows that take as long as loading the weights; narrow units hold 128 columns
_CONFLICT, _CONFLICT_LOAD_ROWS = 1024, 72  # the same there, if rows of weights lie a multiple of 1024 columns apart
_PIECE_SECONDS = 0.14e-6  # of each chunk of rows and columns: the matrix unit fills and drains
_BLOCKS = (8, 16, 32, 64, 128, 256, 512, 1024)
_MOST_COLUMNS = 4096
_CHUNK_M = 512  # most rows to multiply at a time
_CHUNK_N = 512  # and least columns, of gate and up together; more if they are not too much of rhs:
_CHUNK_WEIGHTS = 1024 * 7168  # each 128x128 elements of it have instructions of their own
_CHUNK_PARTS = 256 * 512 * 56  # most elements to scale: the same for the products of each block of K, if it has scales
_STEP_SECONDS = 0.3e-6  # of a row tile: its copies and branches
_COPIES_AT_ONCE = {"v7x": 8}  # that fill a core's memory, by what the compiler gives to each; elsewhere one does

forced = Override[Config]("forced")
"""Kernels traced inside `with forced(config)` are cut as `config` says."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for.

    Attributes:
      num_rows: M, a multiple of `sublanes`.
      num_groups: G.
      depth: K.
      columns: columns of the result.
      halves: 2 for gate and up, which a tile of the result needs both, else 1.
      lhs_itemsize: bytes of an element of lhs.
      rhs_itemsize: bytes of an element of rhs.
      out_itemsize: bytes of an element of the result.
      multiply: dtype in which the matrix unit takes the operands.
      sublanes: rows of a strip.
      lhs_scales: scales of a row of lhs.
      rhs_scales: scales of a column of rhs.
      has_bias: whether a column has a bias.
      cores: cores that share the work.
    """

    num_rows: int
    num_groups: int
    depth: int
    columns: int
    halves: int
    lhs_itemsize: int
    rhs_itemsize: int
    out_itemsize: int
    multiply: jnp.dtype
    sublanes: int
    lhs_scales: int = 0
    rhs_scales: int = 0
    has_bias: bool = False
    cores: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of K whose products are scaled one by one."""
        return max(self.lhs_scales, self.rhs_scales, 1)


def pick(chip: Chip, problem: Problem) -> Config:
    """The configuration for rows spread evenly over the groups.

    Raises:
      Unsupported: no tile of all of K fits VMEM.
    """
    if (config := forced.get()) is not None:
        return config
    options = [config for config in candidates(problem) if fits(chip, problem, config)]
    if not options:
        raise Unsupported(
            f"the TPU kernel keeps two tiles of rhs with all of K and at least {LANES} columns in VMEM (all N columns, "
            f"if N is no multiple of {LANES}), and K = {problem.depth}, N = {problem.columns} are too large for the "
            f"{chip.fast_memory_bytes // MIB} MiB of a core of {chip.name}; pad N to a multiple of {LANES}, or split K"
        )
    best = min(options, key=lambda config: modelled_seconds(chip, problem, config))
    return dataclasses.replace(best, copies=copies_of_tile(chip, problem, best))


def copies_of_tile(chip: Chip, problem: Problem, config: Config) -> int:
    """Copies of a weight tile that, with those of the other tiles on their way, fill the memory."""
    at_once = _COPIES_AT_ONCE.get(chip.name, 1)
    return 1 if at_once == 1 else problem.halves * _cdiv(at_once, problem.halves * (config.weight_buffers - 1))


def vmem_limit(chip: Chip) -> int:
    """Bytes of VMEM that a kernel may use."""
    return int(chip.fast_memory_bytes * _VMEM_SHARE)


def vmem_request(chip: Chip, problem: Problem, config: Config) -> int:
    """Bytes of VMEM to ask for: no more than needed, since XLA keeps other arrays in the rest."""
    return min(vmem_bytes(problem, config) + _INTERNAL_BYTES, chip.fast_memory_bytes)


def candidates(problem: Problem) -> Iterator[Config]:
    """Row tiles of powers of two; even parts of the columns, or all of them where they do not end with a lane."""
    widths = [problem.columns]
    if problem.columns % LANES == 0:
        widths = [width for width in _even_parts(problem.columns) if width <= _MOST_COLUMNS]
    most = max(problem.sublanes, 1 << (problem.num_rows - 1).bit_length())
    blocks = [block for block in _BLOCKS if block % problem.sublanes == 0 and block <= most]
    chunks = [chunk for chunk in blocks if chunk <= _most_rows(problem)] or blocks[:1]
    for block_m, block_n, weight_buffers in itertools.product(blocks, widths, (3, 2)):
        for chunk_m in chunks:
            if chunk_m <= block_m:
                for chunk_n in _chunks_of_columns(problem, block_n, chunk_m):
                    yield Config(block_m, block_n, weight_buffers, chunk_m, chunk_n)


def _most_rows(problem: Problem) -> int:
    """The most rows that are multiplied at a time."""
    return _CHUNK_M if problem.blocks == 1 else min(_CHUNK_M, _CHUNK_PARTS // (problem.blocks * _CHUNK_N))


def _chunks_of_columns(problem: Problem, block_n: int, chunk_m: int) -> list[int]:
    """Even parts of a tile's columns: as wide as the instructions allow, and narrower, which takes less VMEM."""
    most = _CHUNK_WEIGHTS // problem.depth
    if problem.blocks > 1:
        most = min(most, _CHUNK_PARTS // (problem.blocks * chunk_m))
    least, most = _CHUNK_N // problem.halves, most // problem.halves
    return [min(part, block_n) for part in _even_parts(block_n) if least <= part <= most] or [min(block_n, least)]


def _even_parts(columns: int) -> list[int]:
    """Widths in whole lanes into which columns can be cut evenly."""
    return sorted({_padded(_cdiv(columns, count), LANES) for count in range(1, _cdiv(columns, LANES) + 1)})


def fits(chip: Chip, problem: Problem, config: Config) -> bool:
    """Whether the kernel's buffers fit VMEM."""
    return vmem_bytes(problem, config) + _INTERNAL_BYTES <= vmem_limit(chip)


def vmem_bytes(problem: Problem, config: Config) -> int:
    """Bytes of the kernel's buffers, and of what it keeps of a tile while it multiplies."""
    return _buffer_bytes(problem, config) + _kept_bytes(problem, config)


def _buffer_bytes(problem: Problem, config: Config) -> int:
    """`memory.Scratch` as it lies in VMEM: the last dimension in whole lanes, float32 rows in whole registers."""
    width = _padded(config.block_n, LANES)
    depth = _padded(problem.depth, LANES)
    column_scales = _padded(problem.rhs_scales, _SUBLANES) + _SUBLANES * problem.has_bias
    rhs = problem.halves * width * (depth * problem.rhs_itemsize + 4 * column_scales)
    lhs = config.block_m * (depth * problem.lhs_itemsize + 4 * _padded(problem.lhs_scales, LANES))
    out = config.block_m * width * problem.out_itemsize
    shared = _cdiv(problem.columns, config.block_n) * problem.sublanes * width * problem.out_itemsize
    return config.weight_buffers * rhs + 2 * lhs + 3 * out + shared


def _kept_bytes(problem: Problem, config: Config) -> int:
    """What registers cannot hold of a chunk. The weights are not part of it: they go to the matrix unit as they come.

    Where scales come in blocks, one block of K is multiplied after the other; gate and up share what they need of lhs,
    which therefore stays until the end. An element of lhs then takes 16 bits, even if it has 8, and one that is
    multiplied in float32 four times 32, for the parts that full precision is made of.
    """
    kept = problem.blocks if problem.halves > 1 else 1
    depth = kept * _padded(_cdiv(problem.depth, problem.blocks), LANES)
    lhs = depth * (16 if problem.multiply.itemsize == 4 else 2)
    scales = 4 * LANES * min(problem.lhs_scales, kept)  # each is spread over the lanes
    width = problem.halves * _padded(min(config.chunk_n, config.block_n), LANES)
    sums = 2 * 4 * width  # a product, and the sum so far
    return config.chunk_m * (lhs + scales + sums)


def modelled_seconds(chip: Chip, problem: Problem, config: Config) -> float:
    """Time of the product."""
    groups = min(problem.num_groups, problem.num_rows)
    # A group that does not begin with a strip reaches into one more.
    rows = _cdiv(problem.num_rows, groups) + problem.sublanes // 2
    tiles = _cdiv(rows, config.block_m)
    column_tiles = _cdiv(_cdiv(problem.columns, config.block_n), problem.cores)
    width = config.block_n * problem.halves
    rate = chip.peak(problem.multiply) / chip.cores
    bandwidth = chip.hbm_bandwidth / chip.cores
    chunks = _chunks(rows, problem, config)
    multiplied = sum(max(length, _load_rows(chip, config)) for length in chunks)
    multiply = 2 * multiplied * problem.depth * problem.halves * _multiplied_columns(chip, config) / rate
    multiply += len(chunks) * _cdiv(config.block_n, config.chunk_n) * _PIECE_SECONDS
    weights = width * problem.depth * problem.rhs_itemsize / bandwidth
    lhs = rows * problem.depth * problem.lhs_itemsize / bandwidth / (1 if tiles > 1 else column_tiles)
    memory = weights + lhs
    # Of the shorter one some shows too, more so when only one weight tile is on its way.
    behind = 0.05 if config.weight_buffers > 2 else 0.15
    tile = max(multiply, memory) + behind * min(multiply, memory) + tiles * _STEP_SECONDS
    return weights + groups * column_tiles * tile


def _chunks(rows: int, problem: Problem, config: Config) -> list[int]:
    """The chunks in which a given number of rows is multiplied."""
    strips, chunk = _cdiv(rows, problem.sublanes), config.chunk_m // problem.sublanes
    whole, rest = divmod(strips, chunk)
    last = [min(length for length in chunk_lengths(chunk, problem.blocks) if length >= rest)] if rest else []
    return [length * problem.sublanes for length in [chunk] * whole + last]


def _multiplied_columns(chip: Chip, config: Config) -> int:
    """Columns of a tile, each chunk of them filled up to whole matrix units."""
    whole, rest = divmod(config.block_n, config.chunk_n)
    unit = chip.matrix_unit or LANES
    return whole * _padded(config.chunk_n, unit) + _padded(rest, unit)


def _load_rows(chip: Chip, config: Config) -> int:
    """Rows that the matrix unit takes in the time in which the next weights come from VMEM."""
    if chip.matrix_unit != LANES:
        return _LOAD_ROWS
    return _NARROW_LOAD_ROWS if config.block_n % _CONFLICT else _CONFLICT_LOAD_ROWS


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int, multiple: int) -> int:
    return _cdiv(size, multiple) * multiple

"""How the TPU kernels cut their work: the configuration of least modelled time that fits VMEM.

The model adds up, over the weight tiles of a group, the larger of what the matrix unit needs for the group's row tiles
and what memory needs to deliver the weights and rows. The matrix unit is loaded with the weights anew for each row
tile, which costs as much as `_LOAD_ROWS` rows more.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import MIB, Chip
from pallas_kernels.grouped_matmul.tpu_kernel import Config

LANES = 128
_VMEM_SHARE = 0.9  # of VMEM for one kernel
_INTERNAL_BYTES = 4 * MIB  # what the compiler keeps there besides
_LOAD_ROWS = 128
_STEP_SECONDS = 0.3e-6  # of a row tile: its copies and branches
_CHUNK = 256

_forced = contextvars.ContextVar[Config | None]("forced", default=None)


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
      scale_bytes: bytes of scales and bias of a column of rhs.
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
    scale_bytes: int = 0
    cores: int = 1


def pick(chip: Chip, problem: Problem) -> Config:
    """The configuration for rows spread evenly over the groups.

    Raises:
      Unsupported: no tile of all of K fits VMEM.
    """
    if (config := _forced.get()) is not None:
        return config
    options = [config for config in candidates(problem) if fits(chip, problem, config)]
    if not options:
        raise Unsupported(
            f"the TPU kernel keeps two tiles of rhs with all of K and at least {LANES} columns in VMEM (all N columns, if "
            f"N is no multiple of {LANES}), and K = {problem.depth}, N = {problem.columns} are too large for the "
            f"{chip.fast_memory_bytes // MIB} MiB of a core of {chip.name}; pad N to a multiple of {LANES}, or split K"
        )
    return min(options, key=lambda config: modelled_seconds(chip, problem, config))


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Kernels traced in this context are cut as `config` says."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


def vmem_limit(chip: Chip) -> int:
    """Bytes of VMEM that a kernel may use."""
    return int(chip.fast_memory_bytes * _VMEM_SHARE)


def candidates(problem: Problem) -> Iterator[Config]:
    """Row tiles of powers of two; column tiles of whole lanes, or all columns where they do not end with a lane."""
    widths = (128, 256, 512, 768, 1024, 1536, 2048, 4096)
    widths = [n for n in widths if n <= problem.columns] if problem.columns % LANES == 0 else [problem.columns]
    most = max(problem.sublanes, 1 << (problem.num_rows - 1).bit_length())
    for block_m in (16, 32, 64, 128, 256, 512, 1024):
        if block_m % problem.sublanes or block_m > most:
            continue
        for block_n in widths:
            for weight_buffers in (3, 2):
                yield Config(block_m, block_n, weight_buffers, min(_CHUNK, block_n))


def fits(chip: Chip, problem: Problem, config: Config) -> bool:
    """Whether the kernel's buffers fit VMEM."""
    return vmem_bytes(problem, config) + _INTERNAL_BYTES <= vmem_limit(chip)


def vmem_bytes(problem: Problem, config: Config) -> int:
    """Bytes of the kernel's buffers, and of what it keeps of a tile while it multiplies."""
    width = _padded(config.block_n, LANES)
    depth = _padded(problem.depth, LANES)
    rhs = problem.halves * width * (depth * problem.rhs_itemsize + 8 * problem.scale_bytes)
    lhs = config.block_m * depth * problem.lhs_itemsize
    out = config.block_m * width * problem.out_itemsize
    shared = _cdiv(problem.columns, config.block_n) * problem.sublanes * width * problem.out_itemsize
    chunk = _padded(min(config.chunk, width), LANES)
    multiply = jax.dtypes.canonicalize_dtype(problem.multiply).itemsize
    parts = 2 * problem.halves * config.block_m * chunk * 4
    converted = 0
    if problem.rhs_itemsize != multiply:
        converted += problem.halves * depth * chunk * multiply
    if problem.lhs_itemsize != multiply:
        converted += config.block_m * depth * multiply
    return config.weight_buffers * rhs + 2 * lhs + 3 * out + shared + parts + converted


def modelled_seconds(chip: Chip, problem: Problem, config: Config) -> float:
    """Time of the product."""
    groups = min(problem.num_groups, problem.num_rows)
    rows = _cdiv(problem.num_rows, groups)
    # A group that does not begin with a strip reaches into one more.
    tiles = _cdiv(rows + problem.sublanes // 2, config.block_m)
    column_tiles = _cdiv(problem.columns, config.block_n)
    shared_tiles = _cdiv(column_tiles, problem.cores)
    width = config.block_n * problem.halves
    peak = chip.peak(problem.multiply) / chip.cores
    bandwidth = chip.hbm_bandwidth / chip.cores
    multiply = tiles * (2 * (config.block_m + _LOAD_ROWS) * problem.depth * width / peak + _STEP_SECONDS)
    lhs = config.block_m * problem.depth * problem.lhs_itemsize * tiles * (1 if tiles > 1 else 1 / shared_tiles)
    memory = (width * problem.depth * problem.rhs_itemsize + lhs) / bandwidth
    first = width * problem.depth * problem.rhs_itemsize / bandwidth
    behind = 0.0 if config.weight_buffers > 2 else 0.1
    return first + groups * shared_tiles * (max(multiply, memory) + behind * min(multiply, memory))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int, multiple: int) -> int:
    return _cdiv(size, multiple) * multiple

"""Rows rounded to 8 bits on NVIDIA GPUs, in one pass.

    floor in time = (bytes of x + bytes of the values and of the scales) / HBM bandwidth

The 128 elements that have a scale lie one after the other in memory, and so do the scales themselves: to the kernel, x
is a matrix of such blocks, [blocks, 128], whatever rows they are of. A program takes a tile of some blocks at a time,
each held by neighbouring threads of a warp, which find its scale among them. The loads of its next tile are on their
way while it works.

The last tile begins early enough to end with x: what two tiles share is computed twice, with the same result.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.rounding import require_fp8, rounded_in_blocks
from pallas_kernels.on_gpu.strips import for_each, in_blocks, launch, rows_in_blocks, store
from pallas_kernels.quantize import SCALE_BLOCK, QTensor
from pallas_kernels.quantize_rows import reference

_LEAST = rows_in_blocks(SCALE_BLOCK)
"""Blocks of which each thread of a program holds one vector."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      blocks: of 128 elements in a tile, at most; a multiple of 8.
      programs_per_core: that run on a core at once.
    """

    blocks: int
    programs_per_core: int


def quantize_rows(x: jax.Array, *, dtype: jnp.dtype, config: Config | None = None) -> QTensor:
    """See `pallas_kernels.quantize_rows.quantize_rows`; `config` is for tuning. Less than 8 blocks are left to XLA.

    Raises:
      Unsupported: a dtype that the kernel does not take, or rows that are no multiple of 128.
    """
    chip = hopper_chip("quantize_rows")
    require_fp8("quantize_rows", x.dtype, dtype)
    if x.shape[-1] % SCALE_BLOCK:
        raise Unsupported(f"quantize_rows: the kernel needs H to be a multiple of {SCALE_BLOCK}, got {list(x.shape)}")
    num_blocks = x.size // SCALE_BLOCK
    if num_blocks < _LEAST:
        return reference.quantize_rows(x, dtype=dtype)
    config = config or _config(x.dtype)
    tile = _tile(num_blocks, chip, config)
    num_tiles = pl.cdiv(num_blocks, tile)
    programs = min(num_tiles, _most_programs(chip, config))

    def body(blocks, values, scale):
        def window(i):
            return pl.ds(jnp.minimum(i * tile, num_blocks - tile), tile)

        def load(i):
            return plgpu.load(blocks.at[window(i)], layout=in_blocks(SCALE_BLOCK), optimized=False)

        def finish(i, loaded):
            rounded, scales = rounded_in_blocks(loaded.astype(jnp.float32), dtype)
            store(values.at[window(i)], rounded)
            store(scale.at[window(i)], scales)

        for_each(lax.axis_index("block"), programs, num_tiles, load, finish)

    outs = [jax.ShapeDtypeStruct((num_blocks, SCALE_BLOCK), dtype), jax.ShapeDtypeStruct((num_blocks,), jnp.float32)]
    values, scale = launch(body, outs, x.reshape(-1, SCALE_BLOCK), name="quantize_rows", blocks=programs)
    return QTensor(values.reshape(x.shape), scale.reshape(*x.shape[:-1], -1))


def _tile(num_blocks: int, chip: Chip, config: Config) -> int:
    """Blocks of a tile: fewer where there would not be a tile for every program that can run."""
    a_program = num_blocks // (_most_programs(chip, config) * _LEAST)
    return _LEAST * max(1, min(config.blocks // _LEAST, a_program))


def _config(dtype: jnp.dtype) -> Config:
    """As many bytes on their way as the memory asks for."""
    return Config(blocks=32 if dtype.itemsize == 2 else 16, programs_per_core=6)


def _most_programs(chip: Chip, config: Config) -> int:
    return chip.cores * config.programs_per_core

"""Rows of groups rounded to 8 bits with the rows last, on NVIDIA GPUs, in one pass.

    floor in time = (bytes of x + bytes of the values) / HBM bandwidth

A unit of work is a block of 128 rows and a strip of features, of which a thread has one, or two neighbours of 16 bits
in one word: all 128 rows of them, in its registers. So no thread needs another one to know the largest number of a
feature, and nothing is transposed but by the order in which a thread writes: it puts 16 rows of a feature side by side
in a vector. The rounded tile passes through shared memory to the copy engine.

The rows of a unit, 512 bytes each, are read by 128 loads that do not wait for one another: a warpgroup has 64 KB on
their way at once. At full bandwidth Little's law asks for 30 to 40 KB on each core, of which three warpgroups share the
registers: while one waits, the others round.

Units go through all blocks of rows before the next strip. A token has a row in several groups, and a strip of all
tokens (16 MB of 32768) stays in the cache: main memory is asked once for a row, not once for each of its groups.

Where the rows of a block lie in x is a table that XLA makes beforehand.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.columns import BLOCK, Columns
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.rounding import require_fp8
from pallas_kernels.on_gpu.smem import swizzled
from pallas_kernels.quantize import scale_of
from pallas_kernels.quantize_columns import reference

_THREADS = 128
"""Threads of a warpgroup, each with the features of one word."""

_VECTOR = 16
"""Rows of a feature that are written at once."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      warpgroups: that run in a block, each on units of its own. Three leave a thread 168 registers, which is enough.
      blocks: most blocks.
      strips: how many strips are visited for a block of rows before the next block of rows, at most.
    """

    warpgroups: int
    blocks: int
    strips: int = 1


@dataclasses.dataclass(frozen=True)
class _Words:
    """Rows as the kernel reads them: two features of 16 bits at once, but one if there is an odd number of strips.

    Attributes:
      dtype: of the features.
      features: of a word, 1 or 2; the first is its lower half.
    """

    dtype: jnp.dtype
    features: int

    @classmethod
    def of(cls, x: jax.Array) -> "_Words":
        """How to read x [T, F]."""
        return cls(x.dtype, 2 if x.dtype.itemsize == 2 and x.shape[1] % (2 * _THREADS) == 0 else 1)

    def view(self, x: jax.Array) -> jax.Array:
        """[T, F] as words [T, F / features, 1]."""
        if self.features == 2:
            x = x.reshape(x.shape[0], -1, 2)
        words = lax.bitcast_convert_type(x, f"int{8 * self.dtype.itemsize * self.features}")
        return words.reshape(x.shape[0], -1, 1)

    def split(self, words: jax.Array) -> list[jax.Array]:
        """Each feature of words, int32, as they come, in float32."""
        if self.dtype.itemsize == 4:
            return [lax.bitcast_convert_type(words, self.dtype)]
        if self.dtype == jnp.bfloat16:  # the upper half of a float32
            halves = [words << 16, words & -(1 << 16)][: self.features]
            return [lax.bitcast_convert_type(x, jnp.float32) for x in halves]
        halves = [words, words >> 16][: self.features]
        return [lax.bitcast_convert_type(x.astype(jnp.int16), self.dtype).astype(jnp.float32) for x in halves]

    def largest(self, words: jax.Array) -> list[jax.Array]:
        """The largest magnitude of each feature over the rows, float32 [threads]; NaN if there is one."""
        # As integers, in the order of which NaN comes last. Bits below a feature decide between equal ones only.
        masks = [0x7FFFFFFF] if self.dtype.itemsize == 4 else [0x7FFF, 0x7FFFFFFF][: self.features]
        return [self.split(jnp.max(words & mask, axis=1))[i] for i, mask in enumerate(masks)]


def quantize_columns(
    x: jax.Array,
    group_sizes: jax.Array,
    row_ids: jax.Array | None = None,
    *,
    dtype: jnp.dtype,
    config: Config | None = None,
) -> Columns:
    """See `pallas_kernels.quantize_columns.quantize_columns`; `config` is for tuning.

    Raises:
      Unsupported: a dtype that the kernel does not take, or features that are no multiple of 128.
    """
    chip = hopper_chip("quantize_columns")
    _check(x, dtype)
    if not x.size:
        return reference.quantize_columns(x, group_sizes, row_ids, dtype=dtype)
    words = _Words.of(x)
    config = config or Config(warpgroups=3, blocks=chip.cores)
    sources, is_owned = reference.sources_of_blocks(x, group_sizes, row_ids)
    num_blocks, num_features = sources.shape[0], x.shape[1]
    padded, strips = num_blocks * BLOCK, num_features // (_THREADS * words.features)
    units, neighbours = num_blocks * strips, math.gcd(strips, config.strips)
    blocks = min(config.blocks, pl.cdiv(units, config.warpgroups))
    workers = blocks * config.warpgroups

    def body(x_ref, is_owned_ref, sources_ref, masks_ref, values, scale, tiles_of_all):
        warpgroup = lax.axis_index("warpgroup")
        first, tiles = lax.axis_index("block") * config.warpgroups + warpgroup, tiles_of_all.at[warpgroup]

        def one_unit(step, _):
            rest, neighbour = _divmod(first + step * workers, neighbours)
            several, block = _divmod(rest, num_blocks)
            strip = several * neighbours + neighbour
            pl.when(is_owned_ref[block] > 0)(lambda: round_unit(strip, block))

        def round_unit(strip, block):
            features = pl.ds(pl.multiple_of(strip * _THREADS, _THREADS), _THREADS)
            places = [x_ref.at[sources_ref[block, row], features] for row in range(BLOCK)]
            loaded = [plgpu.load(place, layout=_layout(1), optimized=False) for place in places]
            # The tile is free again. Without a barrier here the compiler has the first rows masked, and waits for them,
            # before it asks for the last.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            there = [word.astype(jnp.int32) & masks_ref[block, row] for row, word in enumerate(loaded)]
            rows = jnp.concatenate(there, axis=1)
            scales = [scale_of(largest, dtype) for largest in words.largest(rows)]
            inverses = [1 / scale for scale in scales]
            rounded = [
                [_rounded(x, inverse, dtype) for x, inverse in zip(words.split(some), inverses, strict=True)]
                for some in (rows[:, i : i + _VECTOR] for i in range(0, BLOCK, _VECTOR))
            ]
            scale[block, features] = _side_by_side(scales)
            for i, vectors in enumerate(zip(*rounded, strict=True)):
                tiles[i] = jnp.concatenate(vectors, axis=1)
            plgpu.commit_smem()
            for i in range(words.features):
                place = pl.ds(pl.multiple_of(i * padded + block * BLOCK, BLOCK), BLOCK)
                plgpu.copy_smem_to_gmem(tiles.at[i], values.at[features, place], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        lax.fori_loop(0, lax.div(units - 1 - first + workers, jnp.int32(workers)), one_unit, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # What is copied is a matrix: the features of a word are one row of it.
    values, scale = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((num_features // words.features, words.features * padded), dtype),
            jax.ShapeDtypeStruct((num_blocks, num_features // words.features, words.features), jnp.float32),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[swizzled((config.warpgroups, words.features, _THREADS, BLOCK), dtype, any_row=False)],
        kernel_name="quantize_columns",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(words.view(x), is_owned.astype(jnp.int32), jnp.maximum(sources, 0), jnp.where(sources < 0, 0, -1))
    return Columns(values.reshape(num_features, padded), scale.reshape(num_blocks, num_features))


def _divmod(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _rounded(x: jax.Array, inverse: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of features, rounded, as one vector of each feature."""
    return plgpu.layout_cast(x * _along_rows(inverse, x.shape[1]), _layout(x.shape[1])).astype(dtype)


def _along_rows(x: jax.Array, num_rows: int) -> jax.Array:
    """A number of each feature, for so many rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (_THREADS, num_rows), (0,)), _layout(1))


def _side_by_side(scales: Sequence[jax.Array]) -> jax.Array:
    """A number of each feature of a word, in the order of the features."""
    return plgpu.layout_cast(jnp.concatenate([_along_rows(x, 1) for x in scales], axis=1), _layout(len(scales)))


def _layout(columns: int):
    """A matrix of which each thread has a row, in vectors of so many columns."""
    tiling = plgpu.Tiling(((_THREADS, columns), (_THREADS // 4, columns)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


def _check(x: jax.Array, dtype: jnp.dtype) -> None:
    require_fp8("quantize_columns", x.dtype, dtype)
    if x.shape[1] % _THREADS:
        raise Unsupported(f"quantize_columns: the kernel needs F to be a multiple of {_THREADS}, got {list(x.shape)}")

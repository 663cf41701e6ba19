"""Rows that a warpgroup of a GPU holds in its registers: what the kernels share that move rows.

A row is cut into strips of `Strips.width` vectors; thread i of the warpgroup holds the vectors i, i + 128, … of a
strip, 8 or 16 bytes each where the length of a row allows it. Equal strips need not divide a row: the last one begins
early enough to end with the row, and what two strips share is computed twice, with the same result.

`Blocks` are strips of another kind: of blocks of 128 elements, each held by neighbouring threads of one warp, for what
is computed of a block.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.wgmma import along_rows
from pallas_kernels.quantize import SCALE_BLOCK

WARPGROUP = 128
"""Threads of a warpgroup."""

_VECTOR_BYTES = 16
_BLOCKS = 8
"""Blocks of a strip, of which each warp has two; a block has one scale."""

LEAST_COLUMNS = _BLOCKS * SCALE_BLOCK
"""Of the shortest row that `cut_in_blocks` cuts."""

_BLOCK_VECTOR = 8
"""Elements of a vector of a block: those of 16 lanes are one block."""


@dataclasses.dataclass(frozen=True)
class Strips:
    """How a row is cut.

    Attributes:
      vectors: vectors in a row.
      vector: elements of a vector.
      width: vectors in a strip, a multiple of `WARPGROUP`.
    """

    vectors: int
    vector: int
    width: int

    @property
    def count(self) -> int:
        """Strips in a row."""
        return pl.cdiv(self.vectors, self.width)

    def place(self, number) -> tuple[Any, Any]:
        """The row and the strip of it with this number, if all strips of all rows are counted."""
        return lax.div(number, jnp.int32(self.count)), lax.rem(number, jnp.int32(self.count))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a strip."""
        return self.width, self.vector

    @property
    def elements(self) -> int:
        """Elements of all strips of a row, counting twice what two of them share."""
        return self.count * self.width * self.vector

    @property
    def overlap(self) -> bool:
        """Whether two strips share elements."""
        return self.vectors % self.width != 0

    def view(self, x: jax.Array) -> jax.Array:
        """[rows, H] as the [rows, vectors, vector] that `load` and `store` index."""
        return x.reshape(x.shape[0], self.vectors, self.vector)

    def zeros(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """A strip of zeros, in registers."""
        bits = jnp.zeros(self.shape, f"int{8 * jnp.dtype(dtype).itemsize}")
        return plgpu.layout_cast(lax.bitcast_convert_type(bits, dtype), self._layout())

    def load(self, ref, row, strip) -> jax.Array:
        """A strip of a row, in registers."""
        return plgpu.load(ref.at[row, self.window(strip)], layout=self._layout())

    def once(self, strip: int, value: jax.Array) -> jax.Array:
        """A strip with zeros for those elements that are in the strip before it too."""
        shared = (strip + 1) * self.width - self.vectors
        if shared <= 0:
            return value
        vector = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=self._layout())
        return jnp.where(vector >= shared, value, 0.0)

    def sum(self, value: jax.Array) -> jax.Array:
        """The sum of a strip, which all threads get."""
        return jnp.sum(value)

    def store(self, ref, row, strip, value: jax.Array) -> None:
        """Writes a strip of a row."""
        ref[row, self.window(strip)] = value

    def _layout(self):
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=self.vector)

    def window(self, strip):
        """The vectors of a strip."""
        return pl.ds(jnp.minimum(strip * self.width, self.vectors - self.width), self.width)


@dataclasses.dataclass(frozen=True)
class Blocks(Strips):
    """Strips of blocks of 128 elements, eight of them, which are what `vectors` and `vector` stand for."""

    def load(self, ref, row, strip) -> jax.Array:
        """A strip of a row, in registers."""
        return plgpu.load(ref.at[row, self.window(strip)], layout=self._layout(), optimized=False)

    def sum(self, value: jax.Array) -> jax.Array:
        """The sum of a strip, which all threads get."""
        return jnp.sum(jnp.sum(value, axis=1))

    def of_blocks(self, value: jax.Array) -> jax.Array:
        """A number of each block, as a strip."""
        return spread(value, SCALE_BLOCK)

    def store(self, ref, row, strip, value: jax.Array) -> None:
        """Writes a strip of a row, or a number of each of its blocks."""
        store(ref.at[row, self.window(strip)], value)

    def _layout(self):
        return in_blocks(SCALE_BLOCK)


def in_blocks(width: int):
    """The layout of tiles of rows of `width` elements, a power of two, each held by neighbouring threads of a warp.

    It takes multiples of `rows_in_blocks(width)` rows.
    """
    rows = rows_in_blocks(width)
    tiling = plgpu.Tiling(((rows, width), (rows // 4, width), (_BLOCK_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def rows_in_blocks(width: int) -> int:
    """Rows of which each thread of a warpgroup holds one vector."""
    return WARPGROUP * _BLOCK_VECTOR // width


def spread(value: jax.Array, width: int, layout: Any = None) -> jax.Array:
    """A number of each row of a tile that has this layout, else `in_blocks(width)`, as such a tile."""
    return plgpu.layout_cast(along_rows(value, width), in_blocks(width) if layout is None else layout)


def store(to, value: jax.Array) -> None:
    """Writes a tile, or a number of each of its rows, whatever its layout."""
    if hasattr(plgpu, "store"):  # jax 0.11 stores whatever it is given, and has no function of its own for it
        plgpu.store(to, value, optimized=False)
    else:
        to[...] = value


def cut_in_blocks(operator: str, columns: int) -> Blocks:
    """Cuts rows of `columns` elements into blocks of 128.

    Raises:
      Unsupported: they are not whole blocks, or fewer than a strip has.
    """
    if columns % SCALE_BLOCK or columns < LEAST_COLUMNS:
        raise Unsupported(
            f"{operator}: blocks of {SCALE_BLOCK} need rows of a multiple of it, from {LEAST_COLUMNS} on, got {columns}"
        )
    return Blocks(columns // SCALE_BLOCK, SCALE_BLOCK, _BLOCKS)


def cut(operator: str, columns: int, dtype: jax.typing.DTypeLike, most_vectors: int) -> Strips:
    """Cuts rows of `columns` elements into strips of which a thread holds at most `most_vectors` vectors.

    Strips that share nothing come first, then wide vectors (of 16 bytes, or of 8 if those fit better), then few strips.

    Raises:
      Unsupported: a row has less than one element a thread, or elements of more than 4 bytes.
    """
    itemsize = jnp.dtype(dtype).itemsize
    if columns < WARPGROUP or itemsize > 4:
        raise Unsupported(
            f"{operator}: the kernel takes rows of at least {WARPGROUP} elements of 1, 2 or 4 bytes, got {columns} "
            f"of {jnp.dtype(dtype).name}"
        )
    widest = _VECTOR_BYTES // itemsize
    while columns % widest or columns < WARPGROUP * widest:
        widest //= 2
    choices = [
        Strips(columns // vector, vector, WARPGROUP * n)
        for vector in (widest, max(1, widest // 2))
        for n in range(1, min(most_vectors, columns // (WARPGROUP * vector)) + 1)
    ]
    return min(choices, key=lambda strips: (strips.elements, -strips.vector, -strips.width))


def for_each(first, step: int, count: int, fetch: Callable[[Any], Any], body: Callable[[Any, Any], None]) -> None:
    """Calls `body(i, fetch(i))` for i = first, first + step, … below `count`; first must be below both.

    Scalars are fetched one round ahead, so that their latency passes while the round before it works.
    """
    if count <= step:
        body(first, fetch(first))
        return

    def one_round(_, state):
        i, fetched = state
        ahead = fetch(jnp.minimum(i + step, count - 1))
        body(i, fetched)
        return i + step, ahead

    rounds = lax.div(count - 1 - first, jnp.int32(step)) + 1
    lax.fori_loop(0, rounds, one_round, (first, fetch(first)))


def launch(
    body: Callable[..., None],
    out: Any,
    *inputs: jax.Array | None,
    name: str,
    blocks: int,
    scratch: Sequence[Any] = (),
):
    """Runs `body(*inputs, out, *scratch)` in `blocks` blocks of one warpgroup, which share no memory that they write.

    Args:
      body: gets references.
      out: the shape of the result, or a list of several, each of which `body` gets.
      *inputs: arrays, or None, which `body` gets as it is.
      name: of the kernel.
      blocks: how many.
      scratch: what each of them has for itself.
    """
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*inputs)

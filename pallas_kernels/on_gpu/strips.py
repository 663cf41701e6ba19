"""Rows that a warpgroup of a GPU holds in its registers: what the kernels share that move rows.

A row is cut into strips of `Strips.width` vectors; thread i of the warpgroup holds the vectors i, i + 128, … of a
strip, 8 or 16 bytes each where the length of a row allows it. Equal strips need not divide a row: the last one begins
early enough to end with the row, and what two strips share is computed twice, with the same result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported

WARPGROUP = 128
"""Threads of a warpgroup."""

_VECTOR_BYTES = 16


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
        return plgpu.load(ref.at[row, self._window(strip)], layout=self._layout())

    def store(self, ref, row, strip, value: jax.Array) -> None:
        """Writes a strip of a row."""
        ref[row, self._window(strip)] = value

    def _layout(self):
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=self.vector)

    def _window(self, strip):
        return pl.ds(jnp.minimum(strip * self.width, self.vectors - self.width), self.width)


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


def launch(body: Callable[..., None], out: jax.ShapeDtypeStruct, *inputs: jax.Array, name: str, blocks: int):
    """Runs `body(*inputs, out)` in `blocks` blocks of one warpgroup, which share no memory that they write."""
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*inputs)

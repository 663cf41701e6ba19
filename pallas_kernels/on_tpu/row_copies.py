"""Rows of a matrix gathered by index on TPUs: what the kernels share that move rows.

A row of [T, H] lies in main memory as pieces of 128 elements, each in a tile with those of its neighbours, and rows of
16 or 8 bits share 32-bit words with one or three neighbours. A copy engine can take single rows of 32-bit words out of
such tiles, so a matrix is looked at as words, [T / packing, H] uint32, and a copy brings the `packing` rows that share
words. The kernel then picks the row it wants by a shift. So no matrix has to be laid out differently, at the price of
reading `packing` times the bytes; where the whole matrix fits fast memory it is read once instead, and rows are copied
from there.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.stage import Stage
from pallas_kernels.tracing.target import target_platform

LANES = 128
SUBLANES = 8
_WORD = 4

RESIDENT_SHARE = 0.4
"""Of fast memory, that a matrix may take which is read once and gathered from there."""

_IN_FLIGHT_BYTES = 2 << 20
_MOST_ROWS = 256
_STRIP = 512


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the rows of a matrix are looked at.

    Attributes:
      dtype: of its elements.
      columns: H, rounded up to whole lanes; rows of other lengths are padded, which costs a copy.
      is_resident: whether the matrix is held in fast memory.
    """

    dtype: jnp.dtype
    columns: int
    is_resident: bool

    @classmethod
    def of(cls, operator: str, x: jax.Array, chip: Chip) -> "Rows":
        """Looks at x [T, H].

        Raises:
          Unsupported: elements are not 1, 2 or 4 bytes long.
        """
        if x.dtype.itemsize not in (1, 2, _WORD):
            raise Unsupported(f"{operator}: rows have elements of 1, 2 or 4 bytes, got {x.dtype}")
        columns = LANES * max(1, -(-x.shape[1] // LANES))
        num_bytes = x.shape[0] * columns * x.dtype.itemsize
        return cls(x.dtype, columns, num_bytes <= RESIDENT_SHARE * chip.fast_memory_bytes)

    @property
    def packing(self) -> int:
        """Rows that share a word."""
        return _WORD // self.dtype.itemsize

    @property
    def spec(self) -> pl.BlockSpec:
        """Where a kernel finds the matrix."""
        if self.is_resident:
            return pl.BlockSpec(memory_space=pltpu.VMEM)
        return pl.BlockSpec(memory_space=pl.ANY)

    def viewed(self, x: jax.Array) -> jax.Array:
        """What to give the kernel for `x`, with whole tiles, and at least one."""
        tile = SUBLANES * self.packing
        missing = max(tile, -(-x.shape[0] // tile) * tile) - x.shape[0]
        x = jnp.pad(x, ((0, missing), (0, self.columns - x.shape[1])))
        return lax.bitcast_convert_type(x, _taken(x.dtype)) if _has_views() else to_words(x)

    def result(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """The shape and dtype in which a kernel gives `num_rows` rows."""
        if _has_views():
            return jax.ShapeDtypeStruct((num_rows, self.columns), _taken(self.dtype))
        return jax.ShapeDtypeStruct((-(-num_rows // self.packing), self.columns), jnp.uint32)

    def result_block(self, num_rows: int) -> tuple[int, int]:
        """The block of `num_rows` rows of such a result."""
        return (num_rows if _has_views() else num_rows // self.packing), self.columns

    def finished(self, result: jax.Array, num_rows: int, columns: int) -> jax.Array:
        """The rows that a kernel has made."""
        rows = lax.bitcast_convert_type(result, self.dtype) if _has_views() else from_words(result, self.dtype)
        return rows[:num_rows, :columns]

    @property
    def strips(self) -> list:
        """Slices of columns, so narrow that what is computed of a tile of rows stays in registers."""
        return [pl.ds(c, min(_STRIP, self.columns - c)) for c in range(0, self.columns, _STRIP)]

    def rows_at_once(self, num_rows: int, tile: int, factor: int = 1) -> int:
        """Rows to copy in one step: a multiple of `tile`, as many as keep the copy engine busy.

        Args:
          num_rows: how many rows there are in all.
          tile: what the step must be a multiple of.
          factor: copies for each of these rows.
        """
        busy = _IN_FLIGHT_BYTES // (self.columns * _WORD * factor)
        return tile * max(1, min(busy, _MOST_ROWS, num_rows + tile - 1) // tile)

    def vmem_limit(self, source: jax.Array, copies: int, *blocks: tuple[int, ...]) -> int:
        """Fast memory to ask for, in bytes: what a kernel holds and some more, so that XLA may use the rest.

        Args:
          source: the matrix that the kernel gathers from.
          copies: rows that are copied in a step.
          *blocks: shapes of the other blocks, which are held twice, as float32.
        """
        held = source.nbytes if self.is_resident else 0
        buffers = 2 * copies * self.columns * _WORD
        other = sum(2 * _WORD * rows * -(-columns // LANES) * LANES for rows, columns in blocks)
        return int(1.25 * (held + buffers + other)) + (4 << 20)

    def scratch(self, num_rows: int) -> list:
        """Scratch for two steps of `num_rows` copies: words and semaphores."""
        return [pltpu.VMEM((2, num_rows, self.columns), jnp.uint32), pltpu.SemaphoreType.DMA((2,))]

    def words(self, ref):
        """The words of a matrix, or of a result, as the kernel sees it."""
        return ref.bitcast(jnp.uint32) if ref.dtype != jnp.uint32 else ref

    def copies(self, row: jax.Array) -> jax.Array:
        """The index that `start` takes for the rows to copy: the numbers of their words, −1 for a copy to leave out.

        From fast memory a row is always copied, as that costs less than a branch.
        """
        missing = 0 if self.is_resident else -1
        return jnp.where(row >= 0, row // self.packing, missing).astype(jnp.int32)

    def start(self, index, source, buffer, semaphore) -> None:
        """Starts to copy the words index[0, 0, i] of `source` to buffer[i], for every i that has some."""
        self._for_each_copy(index, source, buffer, semaphore, lambda copy: copy.start())

    def wait(self, index, source, buffer, semaphore) -> None:
        """Waits for what `start` began."""
        if self.is_resident:  # as many bytes as the whole buffer has
            pltpu.make_async_copy(buffer, buffer, semaphore).wait()
        else:
            self._for_each_copy(index, source, buffer, semaphore, lambda copy: copy.wait())

    def _for_each_copy(self, index, source, buffer, semaphore, act) -> None:
        words = self.words(source)

        @pl.loop(0, buffer.shape[0], unroll=True if buffer.shape[0] <= SUBLANES else SUBLANES)
        def _(i):
            word = index[0, 0, i]

            def copy():
                act(pltpu.make_async_copy(words.at[pl.ds(word, 1)], buffer.at[pl.ds(i, 1)], semaphore))

            if self.is_resident:
                copy()
            else:
                pl.when(word >= 0)(copy)

    def picker(self, row: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """For rows `row` [n, 1]: words [n, columns] that hold them -> their bits in the low end, 0 where row < 0."""
        width = 8 * self.dtype.itemsize
        mask = jnp.where(row >= 0, jnp.uint32((1 << width) - 1), jnp.uint32(0))
        return lambda words: self.shifted(words, row) & mask

    def shifted(self, words: jax.Array, row: jax.Array) -> jax.Array:
        """Words [n, columns], the bits of the rows `row` [n, 1] that they hold moved to the low end."""
        if self.packing == 1:
            return words
        shift = lax.bitwise_and(row, jnp.int32(self.packing - 1)).astype(jnp.uint32) * (8 * self.dtype.itemsize)
        return lax.shift_right_logical(words, jnp.broadcast_to(shift, words.shape))


def to_words(x: jax.Array) -> jax.Array:
    """[rows, H] as [rows / packing, H] uint32, the first of the rows that share a word in its low end."""
    # By shifts: a conversion to words of another width XLA's CPU backend gets wrong where rows were just rounded.
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32).reshape(-1, 8 * _WORD // width, x.shape[1])
    return functools.reduce(lax.bitwise_or, [bits[:, i] << (width * i) for i in range(bits.shape[1])])


def from_words(words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of `to_words`."""
    width = 8 * jnp.dtype(dtype).itemsize
    bits = jnp.stack([words >> shift for shift in range(0, 8 * _WORD, width)], axis=1)
    return lax.bitcast_convert_type(bits.reshape(-1, words.shape[1]).astype(f"uint{width}"), dtype)


def _taken(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype as which kernels see rows of `dtype`: Mosaic takes no FP16, and only the bits matter here."""
    return jnp.dtype(jnp.bfloat16) if dtype == jnp.float16 else dtype


def _has_views() -> bool:
    """Whether kernels can look at references as words. Interpret mode, on other machines, cannot: XLA does it there."""
    return target_platform() == "tpu"


def pipelined(rows: Rows, steps: "Steps", ahead, now, source, buffers, semaphores, stage: Stage, use: Callable) -> None:
    """The body of a kernel with a grid of (cores, steps + 1): copies the rows of a step while those before are used.

    Args:
      rows: of the source.
      steps: of the kernel.
      ahead: what to copy in this step, from `Rows.copies`, in scalar memory.
      now: what the step before has copied.
      source: the matrix.
      buffers: as `Rows.scratch` makes them.
      semaphores: likewise.
      stage: "comp" copies nothing, "dma" uses nothing.
      use: is called with the buffer that holds the rows `now`.
    """
    core, step = pl.program_id(0), pl.program_id(1)
    slot = lax.rem(step, jnp.int32(2))

    if stage != "comp":

        @pl.when((step < steps.each) & (steps.ahead(core, step) < steps.blocks))
        def ask_for_rows():
            rows.start(ahead, source, buffers.at[slot], semaphores.at[slot])

    # A block beyond the result shares the window of the last one, which has to stay as it is.
    @pl.when((step > 0) & (steps.now(core, step) < steps.blocks))
    def use_rows():
        if stage != "comp":
            rows.wait(now, source, buffers.at[1 - slot], semaphores.at[1 - slot])
        if stage != "dma":
            use(buffers.at[1 - slot])


@dataclasses.dataclass(frozen=True)
class Steps:
    """Blocks of a result, dealt to the cores of a chip, each made one step after its rows are asked for.

    Attributes:
      blocks: of the result.
      cores: that share them.
    """

    blocks: int
    cores: int

    @classmethod
    def of(cls, blocks: int, cores: int) -> "Steps":
        """Deals `blocks` to at most `cores` cores, each of which gets some."""
        return cls(blocks, pl.cdiv(blocks, pl.cdiv(blocks, cores)))

    @property
    def each(self) -> int:
        """Blocks of a core; the last core's may go beyond the result, and are not made then."""
        return pl.cdiv(self.blocks, self.cores)

    @property
    def grid(self) -> tuple[int, int]:
        """The grid of the kernel."""
        return self.cores, self.each + 1

    def ahead(self, core, step):
        """The block whose rows are asked for."""
        return core * self.each + jnp.minimum(step, self.each - 1)

    def now(self, core, step):
        """The block that is made."""
        return core * self.each + jnp.maximum(step - 1, 0)

    def result(self, core, step):
        """`now` within the result."""
        return jnp.minimum(self.now(core, step), self.blocks - 1)

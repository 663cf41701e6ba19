"""The operands of the TPU kernel, how its work is cut, and the memory of a core that follows from both."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu.math import Arithmetic


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_m: rows of a tile, a multiple of chunk_m.
      block_n: columns of a tile of the result, a multiple of 128 unless all of them; gate and up each have as many.
      weight_buffers: weight tiles in VMEM, of which all but one are on their way.
      chunk_m: rows that are multiplied at a time, a multiple of the strip.
      chunk_n: columns that are multiplied at a time.
      copies: in which a tile of weights, rows or the result is copied, each with a semaphore of its own. Gate and up
        have half of them each, or share the only one.
    """

    block_m: int
    block_n: int
    weight_buffers: int
    chunk_m: int
    chunk_n: int
    copies: int = 1


def chunk_lengths(chunk: int, blocks: int) -> list[int]:
    """Lengths of a group's last chunk, in the unit of `chunk`: quarters of it, in whole units. Each length has its own
    instructions, and they are too many where each of several blocks of K has scales: there only the whole chunk.
    """
    return sorted({-(-chunk * quarters // 4) for quarters in range(1, 5)}) if blocks == 1 else [chunk]


class Inputs(NamedTuple):
    """The operands in the layouts that the kernel reads; an absent one is None.

    Attributes:
      lhs: [M/s, s, K], strips of s rows.
      lhs_scale: float32 [M/s, s, 1], or [M/s, s, K/block].
      rhs: [G, K, N], or [G, N, K].
      rhs_scale: float32 [G, 1, N], or [G, K/block, N].
      bias: float32 [G, 1, N].
    """

    lhs: Any
    lhs_scale: Any
    rhs: Any
    rhs_scale: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes that follow from the operands and the configuration.

    Attributes:
      strips: M/s.
      sublanes: s.
      depth: K.
      groups: G.
      columns: of the result.
      column_tiles: of the result; the last one may be narrower.
      cores: that share them.
    """

    strips: int
    sublanes: int
    depth: int
    groups: int
    columns: int
    column_tiles: int
    cores: int

    @classmethod
    def of(cls, inputs: Inputs, arithmetic: Arithmetic, config: Config, cores: int) -> "Layout":
        """The sizes of a call."""
        strips, sublanes, depth = inputs.lhs.shape
        columns = inputs.rhs.shape[1 if arithmetic.k_major else 2] // arithmetic.halves
        tiles = pl.cdiv(columns, config.block_n)
        return cls(strips, sublanes, depth, inputs.rhs.shape[0], columns, tiles, cores)


class Scratch(NamedTuple):
    """A core's memory. Sizes with [2] or [weight_buffers] in front are buffers of a ring."""

    group_index: Any
    group_begin: Any
    group_end: Any
    stored: Any  # [2, 2]: strips and column tile of the copy that leaves each buffer of out; no copy if no strips
    lhs: Any
    lhs_scale: Any
    rhs: Any
    rhs_scale: Any
    bias: Any
    out: Any
    shared: Any  # [column tiles, s, block_n]: the strip in which the next group goes on
    zeros: Any
    lhs_copied: Any
    rhs_copied: Any
    out_copied: Any
    zeros_copied: Any

    @classmethod
    def describe(cls, inputs: Inputs, arithmetic: Arithmetic, config: Config, layout: Layout) -> "list[Any]":
        """The memory that `pallas_call` is asked for; a dummy for what an absent operand needs."""
        s, n, halves, buffers = layout.sublanes, config.block_n, arithmetic.halves, config.weight_buffers
        tile = config.block_m // s
        rhs = (n, layout.depth) if arithmetic.k_major else (layout.depth, n)

        def of(operand, *shape):
            return pltpu.SMEM((1,), jnp.int32) if operand is None else pltpu.VMEM(shape, operand.dtype)

        def rows(operand):
            return of(operand, 2, tile, s, 1 if operand is None else operand.shape[2])

        def columns(operand):
            return of(operand, buffers, halves, 1 if operand is None else operand.shape[1], n)

        out_dtype, dma = arithmetic.out_dtype, pltpu.SemaphoreType.DMA
        per_group = pltpu.SMEM((layout.groups,), jnp.int32)
        return list(
            cls(
                group_index=per_group,
                group_begin=per_group,
                group_end=per_group,
                stored=pltpu.SMEM((2, 2), jnp.int32),
                lhs=rows(inputs.lhs),
                lhs_scale=rows(inputs.lhs_scale),
                rhs=of(inputs.rhs, buffers, halves, *rhs),
                rhs_scale=columns(inputs.rhs_scale),
                bias=columns(inputs.bias),
                out=pltpu.VMEM((2, tile, s, n), out_dtype),
                shared=pltpu.VMEM((layout.column_tiles, s, n), out_dtype),
                zeros=pltpu.VMEM((tile, s, n), out_dtype),
                lhs_copied=dma((2, config.copies)),
                rhs_copied=dma((buffers, config.copies)),
                out_copied=dma((2, config.copies)),
                zeros_copied=dma((config.copies,)),
            )
        )

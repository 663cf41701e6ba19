"""How the kernel's work is cut: the sizes that follow from the operands, and what goes in and between the blocks."""

import dataclasses
from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels.activations import Activation
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.quantize import SCALE_BLOCK
from pallas_kernels.stage import Stage

TOKENS = 8
"""Rows of x in a tile, the fewest that shared memory of the tensor cores has: the kernel takes as many tokens."""

CHOICES = 64
"""Most choices of all tokens."""

BLOCK = SCALE_BLOCK
"""Depth of a tile, and of a scale's block: 128 numbers of 8 bits."""

SLOT_ROWS = 128
"""Of weights, in a slot of the ring, BLOCK bytes each: tiles of one range of columns, one depth below the other."""

TEAMS = 2
"""Warpgroups that multiply: one waits for the tensor cores while the other scales and adds."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      columns: of a tile of h, 16, 32 or 64; they divide I. It takes as many of gate and of up.
      out_columns: of a tile of y, a multiple of 8 up to `columns`; they divide H, and with scales by block 128.
      slots: of the ring, even.
      rows_ahead: experts whose rows of h are in shared memory together, even.
      blocks: of the grid. All have to run at once, as they wait for each other: no more than there are multiprocessors,
        of which each holds one, and no other kernel beside them that waits likewise. XLA runs a program's one by one.
    """

    columns: int
    out_columns: int
    slots: int
    rows_ahead: int
    blocks: int

    @property
    def slots_of_team(self) -> int:
        """Of the ring."""
        return self.slots // TEAMS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a call.

    Attributes:
      num_tokens: T.
      top_k: K.
      hidden: H.
      width: I.
      by_block: whether scales come every 128 of depth (x: 1x128, weights: 128x128), else per row and per channel.
      config: how it is cut.
      activation: of the gate.
      activation_limit: its clamp.
      stage: what is done: all, the multiplications, or the copies.
    """

    num_tokens: int
    top_k: int
    hidden: int
    width: int
    by_block: bool
    config: Config
    activation: Activation = "silu"
    activation_limit: float | None = None
    stage: Stage = "full"

    @property
    def most_hits(self) -> int:
        """Experts that the choices can hit."""
        return self.num_tokens * self.top_k

    @property
    def up_depths(self) -> int:
        """Tiles of gate/up's depth in a slot."""
        return SLOT_ROWS // (2 * self.config.columns)

    @property
    def up_steps(self) -> int:
        """Slots of a tile of h."""
        return pl.cdiv(pl.cdiv(self.hidden, BLOCK), self.up_depths)

    @property
    def up_tiles(self) -> int:
        """Tiles of h of an expert."""
        return pl.cdiv(self.width, self.config.columns)

    @property
    def up_groups(self) -> int:
        """Groups of eight tiles of h of an expert: the largest numbers of their tokens are WGMMA_ROWS numbers."""
        return pl.cdiv(self.up_tiles, WGMMA_ROWS // TOKENS)

    @property
    def down_depths(self) -> int:
        """Tiles of down's depth in a slot."""
        return SLOT_ROWS // self.config.columns

    @property
    def down_steps(self) -> int:
        """Slots of a tile of y and an expert."""
        return pl.cdiv(pl.cdiv(self.width, BLOCK), self.down_depths)

    @property
    def down_depths_used(self) -> int:
        """Tiles of depth of a slot that are not all beyond I."""
        return min(self.down_depths, pl.cdiv(self.width, BLOCK))

    @property
    def down_tiles(self) -> int:
        """Tiles of y."""
        return pl.cdiv(self.hidden, self.config.out_columns)

    @property
    def x_rows(self) -> int:
        """Rows of x, as tiles of TOKENS rows and BLOCK columns, zeros past H."""
        return self.up_steps * self.up_depths * TOKENS

    @property
    def h_rows(self) -> int:
        """Rows of h of an expert, likewise: a multiple of WGMMA_ROWS, zeros past I."""
        rows = self.down_steps * self.down_depths * TOKENS
        return pl.cdiv(rows, WGMMA_ROWS) * WGMMA_ROWS


class Inputs(NamedTuple):
    """The operands.

    Attributes:
      ids: int32 [T · K].
      weights: float32 [T · K].
      x: [x_rows, BLOCK].
      x_scale: float32, of the rows of x by block, else of the tokens; a multiple of WGMMA_ROWS.
      gate_up: [E, 2I, H].
      gate_up_scale: float32 [1 or E, 2I/128, H/128] by block, else [1 or E, 2I].
      down: [E, H, I].
      down_scale: float32, likewise.
      gate_up_bias: [E, 2I] or None.
      down_bias: [E, H] or None.
      residual: [T, H] or None.
    """

    ids: Any
    weights: Any
    x: Any
    x_scale: Any
    gate_up: Any
    gate_up_scale: Any
    down: Any
    down_scale: Any
    gate_up_bias: Any
    down_bias: Any
    residual: Any


class Between(NamedTuple):
    """What blocks leave for each other in global memory, for each expert hit in the order of the list.

    Attributes:
      h: float32 [most_hits · h_rows, BLOCK].
      largest: float32 [most_hits · up_groups · WGMMA_ROWS], the largest absolute value of each token in each tile of
        h; None if scales come by block, for which a tile of rows is enough.
      rounded: `h` in 8 bits.
      scale: float32 [most_hits · h_rows], of their rows.
    """

    h: Any
    largest: Any
    rounded: Any
    scale: Any

"""What a cost model says of one operator."""

import dataclasses
from typing import Literal, get_args

from bench.model.shapes import AttentionShape, GemmShape

LoopOrder = Literal["mnk", "nkm", "mkn"]
LOOP_ORDERS: tuple[LoopOrder, ...] = get_args(LoopOrder)

ExchangeKind = Literal["dispatch", "combine"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A core's tile of a product and the order, outermost first, in which its loops run over them."""

    order: LoopOrder
    M: int
    N: int
    K: int


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """A core's tile of an attention: rows of queries, and keys."""

    Q: int
    K: int


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """What a model says of one operator on one chip.

    Attributes:
      name: the operator within its layer.
      kind: what it does; a lookup reads a row of a table for each token.
      dtype: short name of the operands' dtype, "" for an exchange.
      shape: of a product or an attention, None for all else.
      elapsed: µs from start to end.
      comp_elapsed: µs of the arithmetic alone.
      dma_elapsed: µs of the main-memory traffic alone.
      link_elapsed: µs of the traffic to other chips alone.
      flops: FLOPs without padding; of a lookup those that DS_TPU charges for it.
      dram_traffic: bytes to and from main memory.
      dram_occupy: bytes of weights that the operator keeps in main memory, and for an attention of its cache; DS_TPU's
        model gives of an attention what DS_TPU prints, see `evaluate_attention`.
      param: number of these weights.
      comm_size: payload of an exchange in bytes.
      urate: flops over what the chip's peak does in `elapsed`.
      best_tile: the chosen tile, where the model chooses one.
      best_partition: into how many parts the cores cut G, M, N and K of a product, or B of an attention, where the
        model chooses it.
    """

    name: str
    kind: Literal["matmul", "attention", "lookup", ExchangeKind]
    elapsed: float
    dtype: str = ""
    shape: GemmShape | AttentionShape | None = None
    comp_elapsed: float = 0.0
    dma_elapsed: float = 0.0
    link_elapsed: float = 0.0
    flops: int = 0
    dram_traffic: int = 0
    dram_occupy: int = 0
    param: int = 0
    comm_size: int = 0
    urate: float = 0.0
    best_tile: Tile | AttentionTile | None = None
    best_partition: tuple[int, ...] | None = None

    @property
    def comm_elapsed(self) -> float:
        """`elapsed` of an exchange, 0 for all else."""
        return self.elapsed if self.kind in get_args(ExchangeKind) else 0.0

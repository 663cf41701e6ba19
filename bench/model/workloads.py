"""A Mixture-of-Experts layer, its batch, and its spread over chips, with the numbers that follow from them.

Source of the derived numbers: the DS_TPU evaluator.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from bench.model.busiest_chip import (
    ROUNDINGS,
    Rounding,
    activated_experts,
    check_rounding,
    expected_activated_experts,
    expected_busiest_rows,
)
from bench.model.shapes import OPERAND_DTYPES, OUTPUT_BYTES
from moejax import MoEConfig
from moejax.config import Precision
from sharding.balance import rank_loads

_SIZES_OF_A_LAYER = ("hidden_size", "intermediate_size", "shared_intermediate_size", "num_experts", "top_k")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A layer, its batch, and its spread over chips. `moe_workload` makes one and fills in the defaults.

    Attributes:
      hidden_size: H.
      intermediate_size: I, the width of a routed expert.
      shared_intermediate_size: total width of the shared experts, 0 for none.
      num_experts: E.
      top_k: experts a token picks.
      batch_size: sequences in the whole group of chips.
      q_len: tokens of each sequence in the step, 1 in decode.
      ep: groups of chips that the experts are spread over.
      dp: groups of chips that the batch is spread over; router and shared expert see batch_size / dp sequences. Of the
        ep · moe_tp chips, those of a group repeat each other's work on all but the routed experts.
      moe_tp: chips that share each routed expert's width.
      precision: "w8a8" (8-bit operands and dispatch) or "w16a16" (BF16); combine is BF16 in both.
      quantized_dtype: the 8-bit operands of "w8a8", "fp8" or "int8".
      rounding: how the expected number of activated experts becomes a whole one, see `activated_experts`.
      load: rows of each expert in what was measured, in proportion; None for uniform routing.
      slots: the expert of each slot, where hot experts have several, see `moejax.place`; None for each once, in order.
    """

    hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int
    num_experts: int
    top_k: int
    batch_size: int
    q_len: int
    ep: int
    dp: int
    moe_tp: int = 1
    precision: Precision = "w8a8"
    quantized_dtype: Literal["fp8", "int8"] = "fp8"
    rounding: Rounding = "round"
    load: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def dtype(self) -> str:
        """Name of the operands' dtype, as `OPERAND_DTYPES` spells it."""
        return self.quantized_dtype if self.precision == "w8a8" else "bf16"

    @property
    def num_chips(self) -> int:
        """Chips that hold the experts."""
        return self.ep * self.moe_tp

    @property
    def batch_size_local(self) -> int:
        """Sequences of one data-parallel group."""
        return self.batch_size // self.dp

    @property
    def local_tokens(self) -> int:
        """Tokens of one data-parallel group."""
        return self.batch_size_local * self.q_len

    @property
    def token_per_ep_group(self) -> int:
        """Mean rows (token–expert assignments) of a chip, rounded up."""
        return math.ceil(self.batch_size * self.q_len * self.top_k / self.ep)

    @property
    def expert_per_ep_group(self) -> int:
        """Experts that a chip holds, replicas among them."""
        return (self.num_experts if self.slots is None else len(self.slots)) // self.ep

    @property
    def activated_expert_per_ep_group(self) -> int:
        """Experts that the busiest chip runs: G of the routed products."""
        return activated_experts(self.batch_size, self.ep, self.num_experts, self.top_k, self.rounding)

    @property
    def m_per_group(self) -> int:
        """Rows of an activated expert when a chip has the mean number of rows."""
        return math.ceil(self.token_per_ep_group / self.activated_expert_per_ep_group)

    @property
    def busiest_experts(self) -> int:
        """Expected experts with rows on the chip that has the most of them, rounded as `rounding` says."""
        if self.load is not None:
            return max(1, int((np.array(self.load)[self._experts_of_ranks] > 0).sum(1).max()))
        tokens = self.batch_size * self.q_len
        expected = expected_activated_experts(tokens, self.ep, self.num_experts, self.top_k)
        return max(1, ROUNDINGS[self.rounding](expected))

    @property
    def busiest_rows(self) -> float:
        """Expected rows of the chip that has the most of them."""
        if self.load is not None:
            share = rank_loads(np.array(self.load), self._experts_of_ranks.reshape(-1), self.ep).max() / sum(self.load)
            return float(share * self.batch_size * self.q_len * self.top_k)
        return expected_busiest_rows(self.batch_size * self.q_len, self.ep, self.num_experts, self.top_k)

    @property
    def _experts_of_ranks(self) -> np.ndarray:
        """The experts in the slots of each rank, [ep, slots]."""
        return np.array(range(self.num_experts) if self.slots is None else self.slots).reshape(self.ep, -1)

    @property
    def dispatch_bytes(self) -> int:
        """Mean payload that a chip dispatches, its own share included, at operand width."""
        return self.dispatched(self.token_per_ep_group)

    @property
    def combine_bytes(self) -> int:
        """Mean payload that a chip sends back, in BF16."""
        return self.combined(self.token_per_ep_group)

    def dispatched(self, rows: int) -> int:
        """Bytes of so many rows on their way to the experts."""
        return rows * (self.hidden_size // self.moe_tp) * OPERAND_DTYPES[self.dtype].itemsize

    def combined(self, rows: int) -> int:
        """Bytes of so many rows on their way back."""
        return rows * (self.hidden_size // self.moe_tp) * OUTPUT_BYTES


def moe_workload(
    config: MoEConfig, *, ep: int, dp: int | None = None, q_len: int = 1, moe_tp: int = 1, **settings: Any
) -> Workload:
    """The workload of the layer `config` under a global batch; arguments as `Workload`'s attributes.

    With dp None every chip has sequences of its own: dp = ep · moe_tp.

    Raises:
      ValueError: a size is not positive, dp does not divide batch_size or the chips, ep does not divide num_experts,
        moe_tp does not divide the hidden or the expert width, top_k exceeds num_experts, or a name is unknown.
    """
    sizes = {name: getattr(config, name) for name in _SIZES_OF_A_LAYER}
    return Workload(**sizes, q_len=q_len, ep=ep, dp=ep * moe_tp if dp is None else dp, moe_tp=moe_tp, **settings)


def _check(w: Workload) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_experts", "top_k", "batch_size", "q_len", "ep", "dp", "moe_tp")
    for name in sizes:
        if getattr(w, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(w, name)}")
    if w.shared_intermediate_size < 0:
        raise ValueError(
            f"shared_intermediate_size must be 0 (no shared expert) or its width, got {w.shared_intermediate_size}"
        )
    for name, (one, other) in (("precision", ("w8a8", "w16a16")), ("quantized_dtype", ("fp8", "int8"))):
        if getattr(w, name) not in (one, other):
            raise ValueError(f"{name} must be {one!r} or {other!r}, got {getattr(w, name)!r}")
    check_rounding(w.rounding)
    if w.top_k > w.num_experts:
        raise ValueError(f"top_k must be at most num_experts={w.num_experts}, got {w.top_k}")
    if w.load is not None and (len(w.load) != w.num_experts or min(w.load) < 0 or not sum(w.load)):
        raise ValueError(f"load must hold the rows of {w.num_experts} experts, some of them at least, got {w.load}")
    if w.slots is not None and (len(w.slots) % w.ep or set(w.slots) != set(range(w.num_experts))):
        raise ValueError(
            f"slots must hold each of {w.num_experts} experts, in a multiple of ep={w.ep}, got {len(w.slots)} slots of "
            f"{len(set(w.slots))} experts"
        )
    if w.slots is not None and w.load is None:
        raise ValueError("slots are planned for a load: give load as well")
    if w.num_chips % w.dp:
        raise ValueError(f"dp must divide the ep · moe_tp = {w.num_chips} chips, got {w.dp}")
    splits = ("num_experts", "ep"), ("intermediate_size", "moe_tp"), ("hidden_size", "moe_tp"), ("batch_size", "dp")
    for whole, parts in splits:
        size, count = getattr(w, whole), getattr(w, parts)
        if size % count:
            larger = f" or batch_size={math.ceil(size / count) * count}" if whole == "batch_size" else ""
            raise ValueError(
                f"{whole} must be a multiple of {parts}, got {whole}={size} for {parts}={count}; "
                f"pass {parts}={math.gcd(size, count)}{larger}"
            )

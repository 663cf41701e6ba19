"""The operators of one Mixture-of-Experts layer as a chip of an expert-parallel group sees them.

A `Workload` is a layer and a way to run it; `layer_matmuls` lists what one chip multiplies for it, in order. Nothing
here knows how long anything takes. Source of the derived numbers: the DS_TPU evaluator.
"""

import dataclasses
import math
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from bench.command.values import POSITIVE_INTS
from bench.model.busiest_chip import Rounding, activated_experts, check_rounding, expected_busiest_rows
from moejax import MoEConfig
from moejax.config import Precision

# What each precision's and each command line's short name stands for.
OPERAND_DTYPES: dict[str, jnp.dtype] = {
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
    "int8": jnp.dtype(jnp.int8),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
}
OUTPUT_BYTES = 2  # every matmul writes BF16, and combine travels in BF16

_SIZES_OF_A_LAYER = ("hidden_size", "intermediate_size", "shared_intermediate_size", "num_experts", "top_k")


def operand_dtype(name: str) -> jnp.dtype:
    """The dtype called `name` on command lines.

    Raises:
      ValueError: the name is not one of `OPERAND_DTYPES`.
    """
    try:
        return OPERAND_DTYPES[name]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(OPERAND_DTYPES)}, got {name!r}") from None


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """C[g] = A[g] (M × K) · B[g] (K × N) for g = 1..G."""

    G: int
    M: int
    K: int
    N: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {self!r}")

    def __str__(self) -> str:
        return shape_text(dataclasses.asdict(self))

    @property
    def flops(self) -> int:
        """FLOPs without padding; a multiply-add is two."""
        return 2 * self.G * self.M * self.K * self.N

    @property
    def weights(self) -> int:
        """Elements of B over all groups."""
        return self.G * self.K * self.N


def parse_shape(text: str) -> GemmShape:
    """The shape written as "G,M,K,N" on a command line.

    Raises:
      ValueError: the text is not four positive whole numbers.
    """
    try:
        return GemmShape(*POSITIVE_INTS(text))
    except (ArgumentTypeError, TypeError):
        raise ValueError(
            f"--shape must be four positive whole numbers G,M,K,N like 8,48,7168,2048, below 2^63, got {text!r}"
        ) from None


def shape_text(shape: Mapping[str, Any]) -> str:
    """G,M,K,N of a record, as command lines take them."""
    return ",".join(str(shape[dim]) for dim in "GMKN")


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
      dp: groups of chips that the batch is spread over; router and shared expert see batch_size / dp sequences.
      moe_tp: chips that share each routed expert's width.
      precision: "w8a8" (8-bit operands and dispatch) or "w16a16" (BF16); combine is BF16 in both.
      quantized_dtype: the 8-bit operands of "w8a8", "fp8" or "int8".
      rounding: how the expected number of activated experts becomes a whole one, see `activated_experts`.
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
    moe_tp: int
    precision: Precision = "w8a8"
    quantized_dtype: Literal["fp8", "int8"] = "fp8"
    rounding: Rounding = "round"

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
    def token_per_ep_group(self) -> int:
        """Mean rows (token–expert assignments) of a chip, rounded up."""
        return math.ceil(self.batch_size * self.q_len * self.top_k / self.ep)

    @property
    def expert_per_ep_group(self) -> int:
        """Experts that a chip holds."""
        return self.num_experts // self.ep

    @property
    def activated_expert_per_ep_group(self) -> int:
        """Experts that the busiest chip runs: G of the routed products."""
        return activated_experts(self.batch_size, self.ep, self.num_experts, self.top_k, self.rounding)

    @property
    def m_per_group(self) -> int:
        """Rows of an activated expert when a chip has the mean number of rows."""
        return math.ceil(self.token_per_ep_group / self.activated_expert_per_ep_group)

    @property
    def busiest_rows(self) -> float:
        """Expected rows of the chip that has the most of them."""
        return expected_busiest_rows(self.batch_size * self.q_len, self.ep, self.num_experts, self.top_k)

    @property
    def dispatch_bytes(self) -> int:
        """Payload that a chip dispatches, its own share included, at operand width."""
        return self.token_per_ep_group * (self.hidden_size // self.moe_tp) * OPERAND_DTYPES[self.dtype].itemsize

    @property
    def combine_bytes(self) -> int:
        """Payload that a chip sends back, in BF16."""
        return self.token_per_ep_group * (self.hidden_size // self.moe_tp) * OUTPUT_BYTES


def moe_workload(
    config: MoEConfig,
    *,
    batch_size: int,
    ep: int,
    dp: int | None = None,
    q_len: int = 1,
    moe_tp: int = 1,
    **settings: Any,
) -> Workload:
    """The workload of the layer `config` under a global batch; arguments as `Workload`'s attributes, dp = ep if None.

    Raises:
      ValueError: a size is not positive, dp does not divide batch_size, ep does not divide num_experts, moe_tp does
        not divide the hidden or the expert width, top_k exceeds num_experts, or a name is unknown.
    """
    sizes = {name: getattr(config, name) for name in _SIZES_OF_A_LAYER}
    dp = ep if dp is None else dp
    return Workload(**sizes, batch_size=batch_size, q_len=q_len, ep=ep, dp=dp, moe_tp=moe_tp, **settings)


def layer_matmuls(workload: Workload, routed_rows: float | None = None) -> dict[str, GemmShape]:
    """What one chip multiplies for the layer, by name: router, shared expert, routed experts.

    Router and shared expert are whole on every chip and see its own tokens. `routed_rows` are the rows of the routed
    experts together, the mean over chips if None; they are spread evenly over the activated experts.
    """
    w = workload
    tokens = w.batch_size_local * w.q_len
    shapes = {"gate": GemmShape(1, tokens, w.hidden_size, w.num_experts)}
    if w.shared_intermediate_size:
        shapes |= _mlp("shared", 1, tokens, w.hidden_size, w.shared_intermediate_size)
    groups = w.activated_expert_per_ep_group
    rows = w.token_per_ep_group if routed_rows is None else routed_rows
    return shapes | _mlp("routed", groups, math.ceil(rows / groups), w.hidden_size, w.intermediate_size // w.moe_tp)


def _mlp(kind: str, groups: int, rows: int, hidden: int, width: int) -> dict[str, GemmShape]:
    up, down = GemmShape(groups, rows, hidden, width), GemmShape(groups, rows, width, hidden)
    return {f"{kind}_gate_proj": up, f"{kind}_up_proj": up, f"{kind}_down_proj": down}


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
    splits = ("batch_size", "dp"), ("num_experts", "ep"), ("intermediate_size", "moe_tp"), ("hidden_size", "moe_tp")
    for whole, parts in splits:
        size, count = getattr(w, whole), getattr(w, parts)
        if size % count:
            larger = f" or batch_size={math.ceil(size / count) * count}" if whole == "batch_size" else ""
            raise ValueError(
                f"{whole} must be a multiple of {parts}, got {whole}={size} for {parts}={count}; "
                f"pass {parts}={math.gcd(size, count)}{larger}"
            )

"""The blocks that `bench.decoder` measures, by name: their sizes, their tokens, and the arithmetic of a call."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import jax.numpy as jnp

from bench.model.decoders import GroupedQueryAttention, get_decoder
from bench.model.layers import visible_pairs
from moejax import MoEConfig, get_preset, with_changes
from moejax.config import Precision
from moejax.models import AttentionConfig, BlockConfig, MLPConfig

_DTYPE = jnp.bfloat16
_KV_LEN = 1024
_SLOTS = 8, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a block.

    Attributes:
      block: its sizes.
      batch: B, sequences; of a decode step slots, all of them active.
      length: L, tokens of each.
      kv_len: of a decode step, tokens that each sees, its own among them, for which the cache is just long enough; None
        for whole sequences.
      note: what a reader should know.
    """

    block: BlockConfig
    batch: int
    length: int
    kv_len: int | None = None
    note: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return self.batch * self.length

    @property
    def flops(self) -> int:
        """Of a call's products, a multiply-add counted as two; what causality hides is left out."""
        a, f, hidden = self.block.attention, self.block.feed_forward, self.block.hidden_size
        queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        pairs = self.batch * visible_pairs(self.length, self.kv_len or self.length)
        width, logits = f.intermediate_size, 0
        if isinstance(f, MoEConfig):
            width, logits = f.top_k * f.intermediate_size + f.shared_intermediate_size, f.num_experts
        weights = 2 * hidden * (queries + keys) + 3 * hidden * width + hidden * logits
        return 2 * self.tokens * weights + 4 * queries * pairs

    @property
    def shape(self) -> str:
        """Batch x length x hidden size x heads x width, and of a decode step the keys."""
        a, f = self.block.attention, self.block.feed_forward
        width = f"{f.num_experts}·{f.intermediate_size}" if isinstance(f, MoEConfig) else str(f.intermediate_size)
        text = f"{self.batch}x{self.length}x{a.hidden_size}x{a.num_attention_heads}x{width}"
        return text if self.kv_len is None else f"{text}, kv {self.kv_len}"


def _dense(batch: int, length: int, hidden: int, heads: int, width: int, note: str = "") -> Case:
    attention = AttentionConfig(hidden, heads, heads, hidden // heads, dtype=_DTYPE, param_dtype=_DTYPE)
    network = MLPConfig(hidden, width, dtype=_DTYPE, param_dtype=_DTYPE)
    return Case(BlockConfig(attention, network), batch, length, note=note)


def _decode(model: str, slots: int, sizes: GroupedQueryAttention, *, qk_norm: bool = False, note: str = "") -> Case:
    experts = get_preset(model, dtype=_DTYPE, param_dtype=_DTYPE)
    attention = AttentionConfig(
        experts.hidden_size,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        rope_theta=1e6,
        qk_norm=qk_norm,
        dtype=_DTYPE,
        param_dtype=_DTYPE,
    )
    return Case(BlockConfig(attention, experts), slots, 1, _KV_LEN, note)


def _qwen3(slots: int) -> Case:
    (sizes,) = get_decoder("qwen3-30b-a3b").attentions
    assert isinstance(sizes, GroupedQueryAttention)
    return _decode("qwen3-30b-a3b", slots, sizes, qk_norm=True)


def _deepseek(slots: int) -> Case:
    # As many heads of as many values as its latent attention, and a cache of 512 numbers a token, which has 576.
    sizes = GroupedQueryAttention(heads=128, kv_heads=2, head_dim=128)
    return _decode("deepseek-v3", slots, sizes, note="grouped queries stand in for latent attention")


_BERT = "BERT's sizes; the block is a decoder's, with a gated network"

CASES: Mapping[str, Case] = MappingProxyType(
    {
        "tiny": _dense(1, 32, 256, 4, 1024),
        "bert-base": _dense(1, 128, 768, 12, 3072, _BERT),
        "bert-large": _dense(1, 128, 1024, 16, 4096, _BERT),
        **{f"wide-{b}x{n}": _dense(b, n, 2048, 32, 4096) for b in (1, 4, 8) for n in (64, 128)},
        **{f"decode-qwen3-30b-a3b-{slots}": _qwen3(slots) for slots in _SLOTS},
        **{f"decode-deepseek-v3-{slots}": _deepseek(slots) for slots in _SLOTS},
    }
)


def select_cases(names: Iterable[str] | None, precision: Precision, *, reduce: bool) -> dict[str, Case]:
    """Those of `CASES` with these names, all if None.

    Args:
      names: of cases.
      precision: of experts.
      reduce: whether to make them small enough for any machine: their shapes say nothing then. Of those that become
        the same, the first stands for all.

    Raises:
      ValueError: a name is unknown.
    """
    names = list(CASES if names is None else names)
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"unknown case {unknown[0]!r} in --cases; expected some of {', '.join(CASES)}")
    cases = {name: _with_precision(CASES[name], precision) for name in names}
    if not reduce:
        return cases
    first: dict[Case, str] = {}
    for name, case in cases.items():
        first.setdefault(_reduced(case), name)
    return {name: case for case, name in first.items()}


def _with_precision(case: Case, precision: Precision) -> Case:
    experts = case.block.feed_forward
    if not isinstance(experts, MoEConfig):
        return case
    changed = dataclasses.replace(case.block, feed_forward=with_changes(experts, precision=precision))
    return dataclasses.replace(case, block=changed)


def _reduced(case: Case) -> Case:
    """A few tokens, heads and experts of small widths."""
    a, f, hidden = case.block.attention, case.block.feed_forward, 128
    groups = min(2, a.num_attention_heads // a.num_key_value_heads)
    attention = dataclasses.replace(
        a, hidden_size=hidden, num_attention_heads=4, num_key_value_heads=4 // groups, head_dim=16
    )
    feed_forward: MoEConfig | MLPConfig
    if isinstance(f, MoEConfig):
        shared = min(f.shared_intermediate_size, 128)
        feed_forward = with_changes(
            f, hidden_size=hidden, intermediate_size=128, num_experts=16, shared_intermediate_size=shared
        )
    else:
        feed_forward = dataclasses.replace(f, hidden_size=hidden, intermediate_size=256)
    block = BlockConfig(attention, feed_forward)
    kv_len = None if case.kv_len is None else 16
    return Case(block, min(case.batch, 2), min(case.length, 8), kv_len, "reduced")


def with_backend(case: Case, name: str) -> Case:
    """The case by these kernels: "auto" or "xla" everywhere."""
    attention = dataclasses.replace(case.block.attention, backend="xla" if name == "xla" else "auto")
    feed_forward = dataclasses.replace(case.block.feed_forward, backend=name)
    return dataclasses.replace(
        case, block=dataclasses.replace(case.block, attention=attention, feed_forward=feed_forward)
    )


def sizes_of(case: Case) -> dict[str, int | None]:
    """The sizes of a case for a record."""
    a, f = case.block.attention, case.block.feed_forward
    sizes: dict[str, int | None] = {"batch": case.batch, "length": case.length, "kv_len": case.kv_len}
    for part, names in ((a, _OF_ATTENTION), (f, _OF_FEED_FORWARD)):
        sizes |= {name: getattr(part, name, None) for name in names}
    return sizes


_OF_ATTENTION: Sequence[str] = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_OF_FEED_FORWARD: Sequence[str] = ("intermediate_size", "num_experts", "top_k", "shared_intermediate_size")

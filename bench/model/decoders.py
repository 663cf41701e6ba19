"""The decoders of published models around their Mixture-of-Experts layers, as far as their cost goes.

    decoder = get_decoder("deepseek-v3.2")
    decoder.num_layers, decoder.moe_layers        # 61, 58

Figures are those of each model's published configuration file, which stands beside each entry; `moejax.PRESETS` has
the layer itself under the same name. Layers that predict further tokens are left out.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class GroupedQueryAttention:
    """Query heads in groups, each group with one head of keys and values.

    Attributes:
      heads: of queries.
      kv_heads: of keys and values.
      head_dim: width of each.
      window: the most keys that a query sees, its own among them; None for all before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class SparseIndex:
    """What chooses the keys that a query attends to (DeepSeek's sparse attention).

    Attributes:
      heads: of its queries.
      head_dim: width of each, and of a key.
      top_k: keys that are chosen for a query.
    """

    heads: int
    head_dim: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: of a token one vector is kept, from which all heads make their keys and values.

    Attributes:
      heads: of queries.
      q_lora_rank: width of the latent queries.
      kv_lora_rank: width of the latent keys and values.
      qk_nope_head_dim: width of a head's query without a position.
      qk_rope_head_dim: width of its part with one, and of the kept vector's.
      v_head_dim: width of a head's value.
      index: what chooses the keys, None where every query sees all of them.
    """

    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index: SparseIndex | None = None


Attention = GroupedQueryAttention | LatentAttention


@dataclasses.dataclass(frozen=True)
class Decoder:
    """All that stands around the layers of experts.

    Attributes:
      vocab_size: rows of the embedding, and columns of the head.
      attentions: the kinds of attention, and how many layers have each.
      dense_layers: layers with a dense MLP in the place of experts.
      dense_intermediate_size: width of that MLP.
    """

    vocab_size: int
    attentions: Mapping[Attention, int]
    dense_layers: int = 0
    dense_intermediate_size: int = 0

    @property
    def num_layers(self) -> int:
        """Layers with an attention, which all have."""
        return sum(self.attentions.values())

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.dense_layers


_DEEPSEEK_ATTENTION = LatentAttention(
    heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
_DEEPSEEK_INDEX = SparseIndex(heads=64, head_dim=128, top_k=2048)

DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        # deepseek-ai/DeepSeek-V3 config.json
        "deepseek-v3": Decoder(129280, {_DEEPSEEK_ATTENTION: 61}, dense_layers=3, dense_intermediate_size=18432),
        # deepseek-ai/DeepSeek-V3.2-Exp config.json
        "deepseek-v3.2": Decoder(
            129280,
            {dataclasses.replace(_DEEPSEEK_ATTENTION, index=_DEEPSEEK_INDEX): 61},
            dense_layers=3,
            dense_intermediate_size=18432,
        ),
        # mistralai/Mixtral-8x7B-v0.1 config.json
        "mixtral-8x7b": Decoder(32000, {GroupedQueryAttention(heads=32, kv_heads=8, head_dim=128): 32}),
        # Qwen/Qwen3-30B-A3B config.json
        "qwen3-30b-a3b": Decoder(151936, {GroupedQueryAttention(heads=32, kv_heads=4, head_dim=128): 48}),
        # Qwen/Qwen3-235B-A22B config.json
        "qwen3-235b-a22b": Decoder(151936, {GroupedQueryAttention(heads=64, kv_heads=4, head_dim=128): 94}),
        # openai/gpt-oss-120b config.json: every other layer sees a window
        "gpt-oss-120b": Decoder(
            201088,
            {
                GroupedQueryAttention(heads=64, kv_heads=8, head_dim=64, window=128): 18,
                GroupedQueryAttention(heads=64, kv_heads=8, head_dim=64): 18,
            },
        ),
        # moonshotai/Kimi-K2-Instruct config.json
        "kimi-k2": Decoder(
            163840,
            {dataclasses.replace(_DEEPSEEK_ATTENTION, heads=64): 61},
            dense_layers=1,
            dense_intermediate_size=18432,
        ),
        # meta-llama/Llama-4-Maverick-17B-128E config.json: three layers of four see their chunk of 8192 tokens, counted
        # here as a window of so many, which is what the chunk's last token sees; every other layer has experts
        "llama-4-maverick": Decoder(
            202048,
            {
                GroupedQueryAttention(heads=40, kv_heads=8, head_dim=128, window=8192): 36,
                GroupedQueryAttention(heads=40, kv_heads=8, head_dim=128): 12,
            },
            dense_layers=24,
            dense_intermediate_size=16384,
        ),
    }
)


def get_decoder(name: str) -> Decoder:
    """The decoder of a published model.

    Raises:
      ValueError: the name is unknown.
    """
    try:
        return DECODERS[name.lower()]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(DECODERS)}") from None

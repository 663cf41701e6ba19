"""The Mixture-of-Experts layers of published models.

    config = get_preset("deepseek-v3")
    small = get_preset("mixtral-8x7b", hidden_size=256, intermediate_size=512)

Figures are those of each model's published configuration file; the file is named beside each entry.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moejax.config import MoEConfig
from pallas_kernels.quantize import Quantization

_DEEPSEEK_V3 = MoEConfig(
    hidden_size=7168,
    intermediate_size=2048,
    num_experts=256,
    top_k=8,
    shared_intermediate_size=2048,
    scoring="sigmoid",
    normalize_topk=True,
    routed_scaling_factor=2.5,
    num_groups=8,
    topk_groups=4,
    correction_bias=True,
    sequence_balance_loss=1e-4,
)

# No block of 128 divides gpt-oss's width of 2880, so its 8-bit operands are scaled by row and by channel.
_BY_ROW_AND_CHANNEL = Quantization(lhs_scaling="per_row", rhs_scaling="per_channel")

PRESETS: Mapping[str, MoEConfig] = MappingProxyType(
    {
        # deepseek-ai/DeepSeek-V3 config.json; loss weight from the technical report (arXiv 2412.19437), section 4.2
        "deepseek-v3": _DEEPSEEK_V3,
        # deepseek-ai/DeepSeek-V3.2-Exp config.json: the attention differs, the MoE layer does not
        "deepseek-v3.2": _DEEPSEEK_V3,
        # mistralai/Mixtral-8x7B-v0.1 config.json
        "mixtral-8x7b": MoEConfig(
            hidden_size=4096, intermediate_size=14336, num_experts=8, top_k=2, load_balance_loss=0.02
        ),
        # Qwen/Qwen3-30B-A3B config.json
        "qwen3-30b-a3b": MoEConfig(
            hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8, load_balance_loss=0.001
        ),
        # Qwen/Qwen3-235B-A22B config.json
        "qwen3-235b-a22b": MoEConfig(
            hidden_size=4096, intermediate_size=1536, num_experts=128, top_k=8, load_balance_loss=0.001
        ),
        # openai/gpt-oss-120b config.json; softmax over the four chosen logits equals softmax, then renormalising
        "gpt-oss-120b": MoEConfig(
            hidden_size=2880,
            intermediate_size=2880,
            num_experts=128,
            top_k=4,
            activation="swigluoai",
            activation_limit=7.0,
            expert_bias=True,
            router_bias=True,
            load_balance_loss=0.9,
            quantization=_BY_ROW_AND_CHANNEL,
            wire_scaling="per_row",
        ),
        # moonshotai/Kimi-K2-Instruct config.json
        "kimi-k2": MoEConfig(
            hidden_size=7168,
            intermediate_size=2048,
            num_experts=384,
            top_k=8,
            shared_intermediate_size=2048,
            scoring="sigmoid",
            normalize_topk=True,
            routed_scaling_factor=2.827,
            correction_bias=True,
            sequence_balance_loss=1e-3,
        ),
        # meta-llama/Llama-4-Maverick-17B-128E config.json; the sigmoid of the one chosen logit scales the input
        "llama-4-maverick": MoEConfig(
            hidden_size=5120,
            intermediate_size=8192,
            num_experts=128,
            top_k=1,
            shared_intermediate_size=8192,
            scoring="sigmoid",
            normalize_topk=False,
            scale_inputs=True,
            load_balance_loss=0.001,
        ),
    }
)


def get_preset(name: str, **changes: Any) -> MoEConfig:
    """The layer of a published model, with some fields changed.

    Args:
      name: a key of `PRESETS`, in any case.
      **changes: fields of `MoEConfig` to replace.

    Raises:
      ValueError: the name is unknown, or the changed configuration makes no sense.
    """
    try:
        config = PRESETS[name.lower()]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(PRESETS)}") from None
    return dataclasses.replace(config, **changes)

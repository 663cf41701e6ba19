"""The Mixture-of-Experts layers of published models.

    config = get_preset("deepseek-v3")
    small = get_preset("mixtral-8x7b", hidden_size=256, intermediate_size=512)

Figures are those of each model's published configuration file; the file is named beside each entry.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypedDict, Unpack

import jax

from moejax.config import MoEConfig, Precision
from moejax.routers.base import Router
from moejax.routers.top_k import Scoring, TopKRouter
from pallas_kernels.activations import Activation
from pallas_kernels.quantize import QDtype, Quantization, Scaling
from sharding.exchange.capacity import Scope

_DEEPSEEK_V3 = MoEConfig(
    hidden_size=7168,
    intermediate_size=2048,
    num_experts=256,
    top_k=8,
    shared_intermediate_size=2048,
    router=TopKRouter(
        scoring="sigmoid",
        routed_scaling_factor=2.5,
        num_groups=8,
        topk_groups=4,
        correction_bias=True,
        sequence_balance_loss=1e-4,
    ),
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
            hidden_size=4096,
            intermediate_size=14336,
            num_experts=8,
            top_k=2,
            router=TopKRouter(load_balance_loss=0.02),
        ),
        # Qwen/Qwen3-30B-A3B config.json
        "qwen3-30b-a3b": MoEConfig(
            hidden_size=2048,
            intermediate_size=768,
            num_experts=128,
            top_k=8,
            router=TopKRouter(load_balance_loss=0.001),
        ),
        # Qwen/Qwen3-235B-A22B config.json
        "qwen3-235b-a22b": MoEConfig(
            hidden_size=4096,
            intermediate_size=1536,
            num_experts=128,
            top_k=8,
            router=TopKRouter(load_balance_loss=0.001),
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
            router=TopKRouter(router_bias=True, load_balance_loss=0.9),
            quantization=_BY_ROW_AND_CHANNEL,
        ),
        # moonshotai/Kimi-K2-Instruct config.json
        "kimi-k2": MoEConfig(
            hidden_size=7168,
            intermediate_size=2048,
            num_experts=384,
            top_k=8,
            shared_intermediate_size=2048,
            router=TopKRouter(
                scoring="sigmoid", routed_scaling_factor=2.827, correction_bias=True, sequence_balance_loss=1e-3
            ),
        ),
        # meta-llama/Llama-4-Maverick-17B-128E config.json; the sigmoid of the one chosen logit scales the input
        "llama-4-maverick": MoEConfig(
            hidden_size=5120,
            intermediate_size=8192,
            num_experts=128,
            top_k=1,
            shared_intermediate_size=8192,
            router=TopKRouter(scoring="sigmoid", normalize_topk=False, load_balance_loss=0.001),
            scale_inputs=True,
        ),
    }
)


class Changes(TypedDict, total=False):
    """What `get_preset` can change: fields of `MoEConfig`, and of the `TopKRouter` that all presets have."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int
    router: Router
    activation: Activation
    activation_limit: float | None
    shared_activation: Activation | None
    shared_activation_limit: float | None
    shared_gate: bool
    expert_bias: bool
    scale_inputs: bool
    precision: Precision
    quantization: Quantization
    wire_scaling: Scaling
    wire_gradient_dtype: QDtype | None
    capacity_factor: float | None
    capacity_of: Scope
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike
    transport: str
    backend: str

    scoring: Scoring
    normalize_topk: bool
    routed_scaling_factor: float
    num_groups: int
    topk_groups: int
    group_score_k: int
    router_bias: bool
    correction_bias: bool
    update_rate: float
    load_balance_loss: float
    sequence_balance_loss: float
    z_loss: float


def get_preset(name: str, **changes: Unpack[Changes]) -> MoEConfig:
    """The layer of a published model, with some fields changed.

    Args:
      name: a key of `PRESETS`, in any case.
      **changes: fields of `MoEConfig` to replace, and of its `TopKRouter`.

    Raises:
      ValueError: the name is unknown, or the changed configuration makes no sense.
    """
    try:
        config = PRESETS[str(name).lower()]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(PRESETS)}") from None
    return with_changes(config, **changes)


def with_changes(config: MoEConfig, **changes: Unpack[Changes]) -> MoEConfig:
    """`config` with fields of its own, and of its router, replaced.

    Raises:
      ValueError: no such field, or the changed configuration makes no sense.
    """
    given = dict(changes)
    router: Any = given.pop("router", config.router)
    if not isinstance(router, Router):
        return dataclasses.replace(config, router=router)  # which says what is wrong
    of_router = {field.name for field in dataclasses.fields(router)}
    of_layer = {field.name for field in dataclasses.fields(MoEConfig)}
    if unknown := sorted(set(given) - of_router - of_layer):
        known = sorted(of_layer | of_router)
        likely = [close for name in unknown for close in difflib.get_close_matches(name.lower(), known, 1)]
        hint = f"; did you mean {', '.join(likely)}?" if likely else ""
        kinds = f"MoEConfig or {type(router).__name__}"
        raise ValueError(f"{', '.join(unknown)}: no field of {kinds}{hint}; they have {', '.join(known)}")
    settings: Any = {name: given.pop(name) for name in of_router if name in given}
    others: Any = given
    return dataclasses.replace(config, router=dataclasses.replace(router, **settings), **others)

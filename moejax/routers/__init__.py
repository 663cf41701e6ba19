"""Routers: strategies that say which experts see which tokens, each a layer on the same kernels.

    layer = ROUTERS["loss_free"](config, rngs=nnx.Rngs(params=0, router=1))
    y, aux = layer(x, token_ids=ids, train=True)         # x [..., H], ids [...]
    layer.update(aux)                                    # after each step; does something where "state" says so

| name             | paper, arXiv      | what it does                                                | causal | losses |
|------------------|-------------------|-------------------------------------------------------------|--------|--------|
| softmax          | 2017, 1701.06538  | top-k of softmax scores, no noise                           | yes    | LB     |
| noisy_top_k      | 2017, 1701.06538  | top-k of logits with learnt noise while training            | yes    | I, L   |
| switch           | 2021, 2101.03961  | top-1, capacity factor 1.25: what is over it is dropped     | yes    | LB     |
| loss_free        | 2024, 2412.19437  | sigmoid scores, a bias moved against the load (state)       | yes    | SB     |
| group_limited    | 2024, 2412.19437  | loss_free within a token's best groups (state)              | yes    | SB     |
| expert_choice    | 2022, 2202.09368  | each expert takes its best tokens of the call               | no     |        |
| soft_moe         | 2023, 2308.00951  | experts work on mixtures of a sequence's tokens             | no     |        |
| chain_of_experts | 2025, 2506.18945  | passes through the experts, with a router and residual each | yes    | LB     |
| hash             | 2021, 2106.04426  | a fixed, balanced table from token ids to experts           | yes    |        |
| specialized      | 2023, 2306.08586  | softmax gate on a common expert, trained to specialise      | yes    | S      |

Losses and their default weights: LB load balance 0.01, I importance 0.1, L load 0.1, SB sequence balance 1e-4,
S specialisation 0.01. A weight in the configuration (load_balance_loss for LB, I, L and S, sequence_balance_loss for
SB) comes first. z_loss has no default; where the configuration weighs it, it is added wherever there are logits.

Every factory is called `ROUTERS[name](config, *, rngs, mesh=None)` and takes further settings by name. It keeps the
sizes of `config` and sets the fields that make the router what it is (scoring, groups, correction bias). `layer.causal`
says whether it is.

`Perft` wraps any of these layers, or `moejax.MoE`, for fine-tuning (2024, 2411.08212): the layer is frozen, and small
routed experts beside it are trained. For a router of your own, derive from `Router` and hand it to `RoutedMoE`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moejax.routers.base import Batch, Decision, Gate, Router
from moejax.routers.chain_of_experts import ChainOfExperts, chain_of_experts
from moejax.routers.expert_choice import expert_choice
from moejax.routers.group_limited import group_limited
from moejax.routers.hash import hash_routing
from moejax.routers.layer import RoutedMoE
from moejax.routers.loss_free import loss_free
from moejax.routers.noisy_top_k import noisy_top_k
from moejax.routers.perft import AdapterParam, Perft, perft_mask
from moejax.routers.soft_moe import SoftMoE, soft_moe
from moejax.routers.softmax import softmax
from moejax.routers.specialized import specialized
from moejax.routers.switch import switch

ROUTERS: Mapping[str, Callable[..., RoutedMoE]] = MappingProxyType(
    {
        "softmax": softmax,
        "noisy_top_k": noisy_top_k,
        "switch": switch,
        "loss_free": loss_free,
        "group_limited": group_limited,
        "expert_choice": expert_choice,
        "soft_moe": soft_moe,
        "chain_of_experts": chain_of_experts,
        "hash": hash_routing,
        "specialized": specialized,
    }
)
"""Factories of layers by name: (config, *, rngs, mesh=None) -> RoutedMoE."""

__all__ = [
    "ROUTERS",
    "AdapterParam",
    "Batch",
    "ChainOfExperts",
    "Decision",
    "Gate",
    "Perft",
    "RoutedMoE",
    "Router",
    "SoftMoE",
    "perft_mask",
]

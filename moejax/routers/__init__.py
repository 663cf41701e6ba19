"""Routers: which experts see which tokens. Each is a value, the `router` of a layer's configuration.

    config = ROUTERS["loss_free"](config)                # the same layer with another router
    layer = MoE(config, rngs=nnx.Rngs(params=0, router=1))
    y, aux = layer(x, token_ids=ids)                     # x [..., H], ids [...] where the router goes by them
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

Losses and their default weights: LB load_balance_loss 0.01, I importance_loss 0.1, L load_loss 0.1, SB
sequence_balance_loss 1e-4, S specialization_loss 0.01; 0.0 switches a loss off. z_loss has no default weight.

`ROUTERS[name](config, **settings)` takes the settings of the router by name. It keeps the sizes of `config`, and sets
top_k and capacity_factor where they make the router what it is. `config.router.causal` says whether it is.

`moejax.Perft` wraps any layer for fine-tuning (2024, 2411.08212): the layer is frozen, and small routed experts beside
it are trained. For a router of your own, derive from `Router` and put it into a configuration.
"""

from moejax.routers.base import Decision, Given, Outcome, Router
from moejax.routers.chain_of_experts import ChainRouter
from moejax.routers.expert_choice import ExpertChoiceRouter
from moejax.routers.hash import HashRouter
from moejax.routers.noisy_top_k import NoisyTopKRouter
from moejax.routers.soft_moe import SoftRouter
from moejax.routers.specialized import SpecializedRouter
from moejax.routers.strategies import ROUTERS
from moejax.routers.top_k import TopKRouter

__all__ = [
    "ROUTERS",
    "ChainRouter",
    "Decision",
    "ExpertChoiceRouter",
    "Given",
    "HashRouter",
    "NoisyTopKRouter",
    "Outcome",
    "Router",
    "SoftRouter",
    "SpecializedRouter",
    "TopKRouter",
]

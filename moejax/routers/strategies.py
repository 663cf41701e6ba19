"""The routers by name: each makes the configuration of a layer into that of the same layer with this router.

Settings of the router are taken by name and have the paper's values by default. Of the router that `config` has, those
are kept that make no other router of it: whether the gate has a bias, and the scaling factor of the weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moejax.checks import check_config
from moejax.routers.base import Router
from moejax.routers.chain_of_experts import ChainRouter
from moejax.routers.expert_choice import ExpertChoiceRouter
from moejax.routers.hash import HashRouter
from moejax.routers.noisy_top_k import NoisyTopKRouter
from moejax.routers.soft_moe import SoftRouter
from moejax.routers.specialized import SpecializedRouter
from moejax.routers.top_k import TopKRouter

if TYPE_CHECKING:
    from moejax.config import MoEConfig


def softmax(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """Top-k of softmax scores (Shazeer et al. 2017, without noise), with the Switch loss."""
    return _with(config, TopKRouter, {"load_balance_loss": 0.01, "normalize_topk": _normalizes(config)} | settings)


def noisy_top_k(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """See `NoisyTopKRouter`."""
    return _with(config, NoisyTopKRouter, settings)


def switch(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """Top-1 of softmax scores, weighted by the score itself (Fedus et al. 2021, arXiv 2101.03961).

    An expert takes capacity_factor · T / E tokens, and the rest is dropped and counted: T tokens of the whole batch, or
    of each chip, as `capacity_of` says. A configuration without a capacity factor gets 1.25, the paper's. The paper's
    jitter of the gate's inputs is left out.
    """
    check_config(config)
    factor = 1.25 if config.capacity_factor is None else config.capacity_factor
    config = _with(config, TopKRouter, {"load_balance_loss": 0.01, "normalize_topk": False} | settings, top_k=1)
    return dataclasses.replace(config, capacity_factor=factor)


def loss_free(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """Sigmoid scores balanced by a bias, which `layer.update(aux)` moves (arXiv 2412.19437, section 2.1.2)."""
    deepseek = {"scoring": "sigmoid", "correction_bias": True, "sequence_balance_loss": 1e-4}
    return _with(config, TopKRouter, deepseek | {"normalize_topk": _normalizes(config)} | settings)


def group_limited(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """`loss_free`, with the choice limited to the best topk_groups of num_groups groups.

    With a group on each node, a token travels to few nodes. A configuration without groups gets the most of 8, 4 and 2
    groups that leave two experts or more in each, and half of them for a token, or as many as top_k needs.

    Raises:
      ValueError: the experts do not divide into groups of two and more.
    """
    groups = getattr(_gate(config), "num_groups", 1), getattr(_gate(config), "topk_groups", 1)
    if "num_groups" not in settings:
        if groups[0] == 1:
            groups = default_groups(config.num_experts, config.top_k)
        settings = {"num_groups": groups[0], "topk_groups": groups[1]} | settings
    return loss_free(config, **settings)


def default_groups(num_experts: int, top_k: int) -> tuple[int, int]:
    """num_groups and topk_groups for a configuration that has none: (8, 4) for 64 experts and top_k 8."""
    for num_groups in (8, 4, 2):
        group_size = num_experts // num_groups
        if num_experts % num_groups == 0 and group_size >= 2:
            return num_groups, max(num_groups // 2, math.ceil(top_k / group_size))
    raise ValueError(
        f"num_experts={num_experts} does not divide into 8, 4 or 2 groups of two experts or more; set num_groups and "
        "topk_groups, or take another number of experts"
    )


def expert_choice(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """See `ExpertChoiceRouter`; a capacity factor of `config` becomes the router's."""
    factor = {} if config.capacity_factor is None else {"capacity_factor": config.capacity_factor}
    return _with(config, ExpertChoiceRouter, factor | settings, capacity_factor=None)


def soft_moe(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """See `SoftRouter`."""
    return dataclasses.replace(config, router=SoftRouter(**settings), capacity_factor=None)


def chain_of_experts(config: "MoEConfig", *, passes: int = 2, **settings: Any) -> "MoEConfig":
    """See `ChainRouter`: softmax routers, ⌈K / passes⌉ experts a token and pass; `settings` are those of each pass.

    A K that `passes` does not divide is thus rounded up: of 3 choices become 4 in two passes.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    own = {"load_balance_loss": 0.01, "normalize_topk": _normalizes(config)} | _kept(config, TopKRouter) | settings
    router = ChainRouter(passes=passes, each=TopKRouter(**own))
    return dataclasses.replace(config, router=router, top_k=math.ceil(config.top_k / passes))


def hash_routing(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """See `HashRouter`."""
    return _with(config, HashRouter, settings)


def specialized(config: "MoEConfig", **settings: Any) -> "MoEConfig":
    """See `SpecializedRouter`."""
    return _with(config, SpecializedRouter, {"normalize_topk": _normalizes(config)} | settings)


def _with(config: "MoEConfig", kind: type[Router], settings: dict[str, Any], **changes: Any) -> "MoEConfig":
    check_config(config)
    return dataclasses.replace(config, router=kind(**_kept(config, kind) | settings), **changes)


def _gate(config: "MoEConfig") -> Router:
    """The router of `config`, or of each pass of a chain."""
    return getattr(config.router, "each", config.router)


def _kept(config: "MoEConfig", kind: type[Router]) -> dict[str, Any]:
    """What a router of another kind keeps of that of `config`."""
    fields, gate = {field.name for field in dataclasses.fields(kind)}, _gate(config)
    kept = [name for name in ("router_bias", "routed_scaling_factor") if name in fields and hasattr(gate, name)]
    return {name: getattr(gate, name) for name in kept}


def _normalizes(config: "MoEConfig") -> bool:
    check_config(config)
    return getattr(_gate(config), "normalize_topk", True)


class _Strategies(dict[str, Callable[..., "MoEConfig"]]):
    def __missing__(self, name: str) -> Callable[..., "MoEConfig"]:
        raise KeyError(f"no router {name!r}; there are {', '.join(self)}")


ROUTERS: Mapping[str, Callable[..., "MoEConfig"]] = MappingProxyType(
    _Strategies(
        softmax=softmax,
        noisy_top_k=noisy_top_k,
        switch=switch,
        loss_free=loss_free,
        group_limited=group_limited,
        expert_choice=expert_choice,
        soft_moe=soft_moe,
        chain_of_experts=chain_of_experts,
        hash=hash_routing,
        specialized=specialized,
    )
)
"""The strategies by name: (config, **settings) -> the configuration with that router."""

"""A layer in torch, as its users write it: matrix products, and grouped ones of rows that are sorted by expert."""

from collections.abc import Mapping
from typing import Any

from moejax import MoEConfig, TopKRouter


def mlp(x: Any, gate_up: Any, down: Any) -> Any:
    """A gated network on x [..., H], with gate_up [H, 2, I] and down [I, H]."""
    import torch

    gate, up = (x @ gate_up.flatten(1)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down


def experts(config: MoEConfig, w: Mapping[str, Any], x: Any) -> tuple[Any, Any]:
    """The experts of x [T, H] in BF16, and their numbers [T, K]; `w` has our parameters by their dotted names."""
    import torch

    weights, ids = _route(config, x.float() @ w["router.kernel"].float())
    order = ids.flatten().argsort(stable=True)
    sizes = (ids.flatten()[:, None] == torch.arange(config.num_experts, device=x.device)).sum(0)
    ends = sizes.cumsum(0).int()
    gate_up, down = w["gate_up"], w["down"]
    h = torch._grouped_mm(x[order // config.top_k], gate_up.flatten(2), offs=ends)
    gate, up = h.chunk(2, dim=-1)
    rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)
    y = (rows[order.argsort()].view(*ids.shape, -1) * weights[..., None]).sum(1)
    if config.shared_intermediate_size:
        y = y + mlp(x, w["shared_gate_up"], w["shared_down"])
    return y.to(x.dtype), ids.int()


def _route(config: MoEConfig, logits) -> tuple[Any, Any]:
    """Weights and numbers of the experts of logits [T, E], by top-k, if need be within the best groups."""
    import torch

    router = config.router
    assert isinstance(router, TopKRouter)
    scores = logits.sigmoid() if router.scoring == "sigmoid" else logits.softmax(-1)
    ranked = scores
    if router.num_groups > 1:
        groups = scores.view(scores.shape[0], router.num_groups, -1)
        best = groups.topk(router.group_score_k, -1).values.sum(-1).topk(router.topk_groups, -1).indices
        is_in = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
        ranked = groups.masked_fill(~is_in[..., None], -1.0).flatten(1)
    ids = ranked.topk(config.top_k, -1).indices
    weights = scores.gather(1, ids)
    if router.normalize_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * router.routed_scaling_factor, ids

"""The same block in torch, as its users write it: scaled_dot_product_attention, and grouped products for experts.

It works on the memory of our parameters. Rotary angles are made once, and the cache is written in place.
"""

import functools
import importlib.util
from typing import Any

from flax import nnx

from bench.blocks.cases import Case
from bench.blocks.ours import Inputs, Run
from bench.hopper.peers import to_torch
from moejax import MoEConfig, TopKRouter
from moejax.models.config import AttentionConfig


def why_not(case: Case) -> str | None:
    """Why torch cannot run the case here, or None."""
    experts = case.block.feed_forward
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if isinstance(experts, MoEConfig) and experts.precision != "w16a16":
        return "the block in torch has no experts in 8 bits"
    return None


def runner(case: Case, inputs: Inputs, *, compiled: bool) -> Run:
    """The block in torch, eager or by torch.compile."""
    import torch

    a = case.block.attention
    blocks = [_weights(state) for state in inputs.states]
    x = to_torch(inputs.x)
    first = 0 if case.kv_len is None else case.kv_len - 1
    positions = torch.arange(first, first + case.length, device=x.device)
    half = torch.arange(a.head_dim // 2, device=x.device)
    angles = positions[:, None] * a.rope_theta ** (-half / half.numel())
    turns = tuple(torch.cat([each, each], -1)[:, None].to(x.dtype) for each in (angles.cos(), angles.sin()))
    caches: list[Any] = [None] * len(blocks)
    if inputs.cache is not None:
        keys, values, lengths = map(to_torch, (inputs.cache.keys, inputs.cache.values, inputs.cache.lengths))
        caches = [(keys.clone(), values.clone(), lengths.long()) for _ in blocks]
    one = functools.partial(_block, case)
    if compiled:
        one = torch.compile(one)

    def run() -> tuple[Any, Any]:
        y, ids = x, None
        for weights, cache in zip(blocks, caches, strict=True):
            y, ids = one(weights, y, turns, cache)
        return y, ids

    return run


def _weights(state: nnx.State) -> dict[str, Any]:
    """Our parameters by their dotted names."""
    return {".".join(map(str, path)): to_torch(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def wait(_: Any) -> None:
    """Until all that was begun is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _block(case: Case, w: dict[str, Any], x: Any, turns: tuple[Any, Any], cache: Any) -> tuple[Any, Any]:
    eps = case.block.rms_norm_eps
    x = x + _attention(case.block.attention, w, _norm(x, w["attention_norm.scale"], eps), turns, cache)
    h = _norm(x, w["feed_forward_norm.scale"], eps)
    experts = case.block.feed_forward
    if not isinstance(experts, MoEConfig):
        return x + _mlp(h, w["feed_forward.gate_up"], w["feed_forward.down"]), None
    y, ids = _experts(experts, w, h.flatten(0, 1))
    return x + y.view_as(x), ids.view(*x.shape[:-1], -1)


def _norm(x, scale, eps):
    import torch

    return torch.nn.functional.rms_norm(x, scale.shape, scale, eps)


def _attention(a: AttentionConfig, w, x, turns, cache):
    import torch

    batch, length, _ = x.shape
    qkv = (x @ w["attention.qkv.kernel"]).view(batch, length, -1, a.head_dim)
    q, k, v = qkv.split((a.num_attention_heads, a.num_key_value_heads, a.num_key_value_heads), dim=2)
    if a.qk_norm:
        q = _norm(q, w["attention.q_norm.scale"], a.rms_norm_eps)
        k = _norm(k, w["attention.k_norm.scale"], a.rms_norm_eps)
    q, k = _rotate(q, *turns), _rotate(k, *turns)
    mask = None
    if cache is not None:
        keys, values, lengths = cache
        slots = torch.arange(batch, device=x.device)
        keys[slots, lengths], values[slots, lengths] = k[:, 0], v[:, 0]
        k, v = keys, values
        mask = (torch.arange(keys.shape[1], device=x.device) <= lengths[:, None])[:, None, None]
    y = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=cache is None,
        enable_gqa=a.num_attention_heads != a.num_key_value_heads,
    )
    return y.transpose(1, 2).reshape(batch, length, -1) @ w["attention.out.kernel"]


def _rotate(x, cos, sin):
    import torch

    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _mlp(x, gate_up, down):
    import torch

    gate, up = (x @ gate_up.flatten(1)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down


def _experts(config: MoEConfig, w, x) -> tuple[Any, Any]:
    """The experts of x [T, H], and their numbers [T, K]."""
    import torch

    weights, ids = _route(config, x.float() @ w["feed_forward.router.kernel"].float())
    order = ids.flatten().argsort(stable=True)
    sizes = (ids.flatten()[:, None] == torch.arange(config.num_experts, device=x.device)).sum(0)
    ends = sizes.cumsum(0).int()
    gate_up, down = w["feed_forward.gate_up"], w["feed_forward.down"]
    h = torch._grouped_mm(x[order // config.top_k], gate_up.flatten(2), offs=ends)
    gate, up = h.chunk(2, dim=-1)
    rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)
    y = (rows[order.argsort()].view(*ids.shape, -1) * weights[..., None]).sum(1)
    if config.shared_intermediate_size:
        y = y + _mlp(x, w["feed_forward.shared_gate_up"], w["feed_forward.shared_down"])
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

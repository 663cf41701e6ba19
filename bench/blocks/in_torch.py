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
from bench.plain.layer_in_torch import experts, mlp
from moejax import MoEConfig
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


def _block(case: Case, w: dict[str, Any], x: Any, turns: tuple[Any, Any], cache: Any) -> tuple[Any, Any]:
    eps = case.block.rms_norm_eps
    x = x + _attention(case.block.attention, w, _norm(x, w["attention_norm.scale"], eps), turns, cache)
    h = _norm(x, w["feed_forward_norm.scale"], eps)
    own = {name.removeprefix("feed_forward."): leaf for name, leaf in w.items() if name.startswith("feed_forward.")}
    config = case.block.feed_forward
    if not isinstance(config, MoEConfig):
        return x + mlp(h, own["gate_up"], own["down"]), None
    y, ids = experts(config, own, h.flatten(0, 1))
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

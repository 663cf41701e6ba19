"""The same block in plain JAX, as its users write it: dots, `jax.nn.dot_product_attention`, and `jax.lax.ragged_dot`.

It takes our parameters. Attention is XLA's, not cuDNN's: what is compared with is what JAX does by itself.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.blocks.cases import Case
from bench.blocks.ours import Inputs, Run, in_a_row
from bench.plain.layer_in_jax import experts, mlp
from moejax import MoEConfig
from moejax.models.config import AttentionConfig

Weights = Mapping[str, jax.Array]
Cache = tuple[jax.Array, jax.Array, jax.Array]
"""Keys and values [S, M, G, D], and the tokens that each slot holds, int32 [S]."""


def why_not(case: Case) -> str | None:
    """Why plain JAX cannot run the case, or None."""
    experts = case.block.feed_forward
    if isinstance(experts, MoEConfig) and experts.precision != "w16a16":
        return "the block in plain JAX has no experts in 8 bits"
    return None


def runner(case: Case, inputs: Inputs) -> Run:
    """The block in plain JAX."""
    blocks = [_weights(state) for state in inputs.states]
    caches: list[Cache | None] = [None] * len(blocks)
    if (held := inputs.cache) is not None:
        caches = [(jnp.copy(held.keys), jnp.copy(held.values), jnp.copy(held.lengths)) for _ in blocks]
    return in_a_row(jax.jit(functools.partial(_block, case)), blocks, inputs.x, caches)


def _weights(state: nnx.State) -> Weights:
    """Our parameters by their dotted names."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _block(case: Case, w: Weights, x: jax.Array, cache: Cache | None) -> tuple[Any, Any, Cache | None]:
    eps, feed_forward = case.block.rms_norm_eps, case.block.feed_forward
    attended, cache = _attention(case.block.attention, w, _norm(x, w["attention_norm.scale"], eps), cache)
    x = x + attended
    h = _norm(x, w["feed_forward_norm.scale"], eps)
    own = {name.removeprefix("feed_forward."): leaf for name, leaf in w.items() if name.startswith("feed_forward.")}
    if not isinstance(feed_forward, MoEConfig):
        return x + mlp(h, own["gate_up"], own["down"]), None, cache
    y, ids = experts(feed_forward, own, h.reshape(-1, h.shape[-1]))
    return x + y.reshape(x.shape), ids.reshape(*x.shape[:-1], -1), cache


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def _attention(a: AttentionConfig, w: Weights, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    batch, length, _ = x.shape
    qkv = (x @ w["attention.qkv.kernel"]).reshape(batch, length, -1, a.head_dim)
    ends = a.num_attention_heads, a.num_attention_heads + a.num_key_value_heads
    q, k, v = jnp.split(qkv, ends, axis=2)
    if a.qk_norm:
        q = _norm(q, w["attention.q_norm.scale"], a.rms_norm_eps)
        k = _norm(k, w["attention.k_norm.scale"], a.rms_norm_eps)
    positions, mask = jnp.arange(length), None
    if cache is not None:
        positions = cache[2][:, None]
    q, k = (_rotate(each, positions, a.rope_theta) for each in (q, k))
    if cache is not None:
        slots, (keys, values, lengths) = jnp.arange(batch), cache
        k, v = keys.at[slots, lengths].set(k[:, 0]), values.at[slots, lengths].set(v[:, 0])
        mask = (jnp.arange(keys.shape[1]) <= lengths[:, None])[:, None, None]
        cache = k, v, lengths
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=cache is None, implementation="xla")
    return y.reshape(batch, length, -1) @ w["attention.out.kernel"], cache


def _rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)

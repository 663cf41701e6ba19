"""A layer in plain JAX, as its users write it: dots, and `jax.lax.ragged_dot` of rows that are sorted by expert."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax import MoEConfig, TopKRouter


def mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """A gated network on x [..., H], with gate_up [H, 2, I] and down [I, H]."""
    gate, up = jnp.split(x @ gate_up.reshape(gate_up.shape[0], -1), 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down


def experts(config: MoEConfig, w: Mapping[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The experts of x [T, H] in BF16, and their numbers [T, K]; `w` has our parameters by their dotted names."""
    router = w["router.kernel"].astype(jnp.float32)
    weights, ids = _route(config, jnp.dot(x.astype(jnp.float32), router, precision="highest"))
    order = jnp.argsort(ids.ravel())
    sizes = jnp.bincount(ids.ravel(), length=config.num_experts).astype(jnp.int32)
    gate_up, down = w["gate_up"], w["down"]
    h = jax.lax.ragged_dot(x[order // config.top_k], gate_up.reshape(*gate_up.shape[:2], -1), sizes)
    gate, up = jnp.split(h, 2, axis=-1)
    rows = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, sizes)
    of_tokens = rows[jnp.argsort(order)].reshape(*ids.shape, -1)
    y = jnp.einsum("tkh,tk->th", of_tokens.astype(jnp.float32), weights)
    if config.shared_intermediate_size:
        y += mlp(x, w["shared_gate_up"], w["shared_down"])
    return y.astype(x.dtype), ids


def _route(config: MoEConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and numbers of the experts of logits [T, E], by top-k, if need be within the best groups."""
    router = config.router
    assert isinstance(router, TopKRouter)
    scores = jax.nn.sigmoid(logits) if router.scoring == "sigmoid" else jax.nn.softmax(logits)
    ranked = scores
    if router.num_groups > 1:
        groups = scores.reshape(scores.shape[0], router.num_groups, -1)
        of_group = jax.lax.top_k(groups, router.group_score_k)[0].sum(-1)
        _, best = jax.lax.top_k(of_group, router.topk_groups)
        is_in = (best[:, None] == jnp.arange(router.num_groups)[:, None]).any(-1)
        ranked = jnp.where(is_in[..., None], groups, -1.0).reshape(scores.shape)
    _, ids = jax.lax.top_k(ranked, config.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if router.normalize_topk:
        weights /= weights.sum(-1, keepdims=True)
    return weights * router.routed_scaling_factor, ids

"""A layer forward and backward on one GPU: router, experts, and the gradients of all that it is given."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from bench.hopper.case_data import LAYER_TOP_K, CaseData
from bench.hopper.peers import Implementation, to_torch
from bench.hopper.trained_layer import Weights, in_float32, layer_config, our_layer, random_weights
from bench.inputs.weights import normal
from bench.model.shapes import GemmShape
from bench.plain import layer_in_jax, layer_in_torch
from moejax import MoEConfig

_CHECKED_TOKENS = 512


def training(s: GemmShape, *, in_8_bits: bool) -> CaseData:
    """y, and the gradients of x and of each parameter, for tokens x in BF16 and parameters in BF16.

    In 8 bits weights, rows and cotangents are rounded in each step, for all six products, and the peer is our own layer
    in BF16. Peers in BF16 are the layer in plain JAX and in torch.
    """
    config, weights = layer_config(s, in_8_bits=in_8_bits), random_weights(s)
    x, dy = (normal(seed, (s.G * s.M // LAYER_TOP_K, s.K)) for seed in (0, 4))
    ours = Implementation("moejax", "moejax", {"": _step_of(functools.partial(our_layer, config=config))})
    in_bf16 = functools.partial(our_layer, config=layer_config(s, in_8_bits=False))
    in_jax = functools.partial(_in_jax, config=config)
    peers = (
        (Implementation("moejax, BF16", "moejax", {"": _step_of(in_bf16)}),)
        if in_8_bits
        else (
            Implementation("jax.lax.ragged_dot", "jax", {"": _step_of(in_jax)}),
            Implementation(
                "torch._grouped_mm", "torch", {"": functools.partial(_step_in_torch, config=config)}, _to_torch
            ),
        )
    )
    reference = _step_of(functools.partial(our_layer, config=in_float32(config)))
    return CaseData(
        (x, weights, dy), ours, peers, reference, calls=1, checked=(x[:_CHECKED_TOKENS], weights, dy[:_CHECKED_TOKENS])
    )


def _step_of(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward and backward of layer(x, weights)."""

    def step(x: jax.Array, weights: Weights, dy: jax.Array) -> tuple[Any, ...]:
        y, pullback = jax.vjp(layer, x, weights)
        return y, *pullback(dy.astype(y.dtype))

    return step


def _in_jax(x: jax.Array, weights: Weights, *, config: MoEConfig) -> jax.Array:
    rows = x.shape[0] * config.top_k
    widest = max(config.hidden_size, 2 * config.intermediate_size)
    needed = config.num_experts * rows * widest * x.dtype.itemsize
    if needed > (has := (jax.devices()[0].memory_stats() or {}).get("bytes_limit", needed)):
        raise MemoryError(
            f"XLA's gradient of ragged_dot spreads rows over all experts, {needed / 2**30:.0f} GiB; this GPU has "
            f"{has / 2**30:.0f}"
        )
    return layer_in_jax.experts(config, weights, x)[0]


def _to_torch(x: jax.Array, weights: Weights, dy: jax.Array) -> tuple[Any, ...]:
    return jax.tree.map(to_torch, (x, weights, dy))


def _step_in_torch(x: Any, weights: Weights, dy: Any, *, config: MoEConfig) -> tuple[Any, ...]:
    import torch

    x, weights = jax.tree.map(lambda leaf: leaf.detach().requires_grad_(), (x, dict(weights)))
    y, _ = layer_in_torch.experts(config, weights, x)
    dx, *of_weights = torch.autograd.grad(y, (x, *weights.values()), dy)
    return y.detach(), dx, dict(zip(weights, of_weights, strict=True))

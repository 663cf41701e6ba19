"""A layer forward and backward on one GPU: router, experts, and the gradients of all that it is given."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.case_data import LAYER_TOP_K, CaseData
from bench.hopper.peers import Implementation, to_torch
from bench.inputs.weights import normal
from bench.model.shapes import GemmShape
from bench.plain import layer_in_jax, layer_in_torch
from moejax import MoEConfig, MoEParams, Quantization, RoundedExperts, moe, with_changes

Weights = Mapping[str, Any]
"""Parameters by their dotted names: "router.kernel" [H, E], "gate_up" [E, H, 2, I] and "down" [E, I, H]."""

_CHECKED_TOKENS = 512


def training(s: GemmShape, *, in_8_bits: bool) -> CaseData:
    """y, and the gradients of x and of each parameter, for tokens x in BF16 and parameters in BF16.

    In 8 bits weights, rows and cotangents are rounded in each step, for all six products, and the peer is our own layer
    in BF16. Peers in BF16 are the layer in plain JAX and in torch.
    """
    config, weights = config_of(s, in_8_bits=in_8_bits), weights_of(s)
    x, dy = (normal(seed, (s.G * s.M // LAYER_TOP_K, s.K)) for seed in (0, 4))
    ours = Implementation("moejax", "moejax", {"": _step_of(functools.partial(our_layer, config=config))})
    in_bf16 = functools.partial(our_layer, config=config_of(s, in_8_bits=False))
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
    reference = _step_of(functools.partial(our_layer, config=exact(config)))
    return CaseData(
        (x, weights, dy), ours, peers, reference, calls=1, checked=(x[:_CHECKED_TOKENS], weights, dy[:_CHECKED_TOKENS])
    )


def config_of(s: GemmShape, *, in_8_bits: bool) -> MoEConfig:
    """A layer of G experts of width N, K its hidden size; in 8 bits all six products are."""
    config = MoEConfig(s.K, s.N, s.G, LAYER_TOP_K)
    if not in_8_bits:
        return config
    fp8: Any = "float8_e4m3fn"
    quantization = Quantization(gradient_dtype=fp8, weights_gradient_dtype=fp8)
    return with_changes(config, precision="w8a8", quantization=quantization)


def exact(config: MoEConfig) -> MoEConfig:
    """The same layer by XLA in float32."""
    return with_changes(config, precision="w16a16", quantization=Quantization(), dtype=jnp.float32, backend="xla")


def weights_of(s: GemmShape, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Weights:
    """Random parameters of that layer."""
    shapes = {"router.kernel": (s.K, s.G), "gate_up": (s.G, s.K, 2, s.N), "down": (s.G, s.N, s.K)}
    widths = {"down": s.N}
    return {
        name: normal(seed, shape, scale=widths.get(name, s.K) ** -0.5).astype(dtype)
        for seed, (name, shape) in enumerate(shapes.items(), start=1)
    }


def _step_of(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward and backward of layer(x, weights)."""

    def step(x: jax.Array, weights: Weights, dy: jax.Array) -> tuple[Any, ...]:
        y, pullback = jax.vjp(layer, x, weights)
        return y, *pullback(dy.astype(y.dtype))

    return step


def params_of(weights: Weights) -> MoEParams:
    """The parameters as our layer takes them."""
    router = {"kernel": weights["router.kernel"]}
    return MoEParams(router=router, gate_up=weights["gate_up"], down=weights["down"])


def our_layer(x: jax.Array, weights: Weights, *, config: MoEConfig, rounded: RoundedExperts | None = None) -> jax.Array:
    """Y of tokens x."""
    return moe(x, params_of(weights), config, rounded=rounded)[0]


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

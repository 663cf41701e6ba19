"""The layer that training cases are of, its parameters by name, and how ours takes them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.case_data import LAYER_TOP_K
from bench.inputs.weights import normal
from bench.model.shapes import GemmShape
from moejax import MoEConfig, MoEParams, Quantization, RoundedExperts, moe, with_changes

Weights = Mapping[str, Any]
"""Parameters by their dotted names: "router.kernel" [H, E], "gate_up" [E, H, 2, I] and "down" [E, I, H]."""


def layer_config(s: GemmShape, *, in_8_bits: bool) -> MoEConfig:
    """A layer of G experts of width N, K its hidden size; in 8 bits all six products are."""
    config = MoEConfig(s.K, s.N, s.G, LAYER_TOP_K)
    if not in_8_bits:
        return config
    fp8: Any = "float8_e4m3fn"
    quantization = Quantization(gradient_dtype=fp8, weights_gradient_dtype=fp8)
    return with_changes(config, precision="w8a8", quantization=quantization)


def in_float32(config: MoEConfig) -> MoEConfig:
    """The same layer by XLA in float32."""
    return with_changes(config, precision="w16a16", quantization=Quantization(), dtype=jnp.float32, backend="xla")


def random_weights(s: GemmShape, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Weights:
    """Random parameters of that layer."""
    shapes = (("router.kernel", (s.K, s.G), s.K), ("gate_up", (s.G, s.K, 2, s.N), s.K), ("down", (s.G, s.N, s.K), s.N))
    return {
        name: normal(seed, shape, scale=fan_in**-0.5).astype(dtype)
        for seed, (name, shape, fan_in) in enumerate(shapes, start=1)
    }


def params_of(weights: Weights) -> MoEParams:
    """The parameters as our layer takes them."""
    router = {"kernel": weights["router.kernel"]}
    return MoEParams(router=router, gate_up=weights["gate_up"], down=weights["down"])


def our_layer(x: jax.Array, weights: Weights, *, config: MoEConfig, rounded: RoundedExperts | None = None) -> jax.Array:
    """The layer's y of tokens x."""
    return moe(x, params_of(weights), config, rounded=rounded)[0]

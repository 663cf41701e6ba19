"""The gradients of a layer's parameters added up over micro-batches, on one GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.case_data import LAYER_TOP_K, CaseData
from bench.hopper.peers import Implementation
from bench.hopper.trained_layer import Weights, in_float32, layer_config, our_layer, params_of, random_weights
from bench.inputs.weights import normal
from bench.model.shapes import GemmShape
from moejax import MoEConfig, quantize_for_training

MICRO_BATCHES = 4

_CHECKED_TOKENS = 128

Results = tuple[Weights, tuple[jax.Array, jax.Array]]
"""The sums of gradients, and y and dx [MICRO_BATCHES, T, H]."""


def micro_batches(s: GemmShape, *, in_8_bits: bool) -> CaseData:
    """y, dx and the sums of the other gradients, scanned over tokens in BF16; a call is a micro-batch.

    Ours are added up in refs, and weights that are rounded are rounded before the scan. The peer is our layer with the
    sums of what `jax.vjp` gives. Parameters, and sums, are float32 in 8 bits and else BF16.
    """
    config = layer_config(s, in_8_bits=in_8_bits)
    weights = random_weights(s, jnp.float32 if in_8_bits else jnp.bfloat16)
    x, dy = (normal(seed, (MICRO_BATCHES, s.G * s.M // LAYER_TOP_K, s.K)) for seed in (0, 4))
    return CaseData(
        (x, weights, dy),
        Implementation("moejax", "moejax", {"": functools.partial(_in_refs, config=config)}),
        (Implementation("gradients and sums", "moejax", {"": functools.partial(_in_sums, config=config)}),),
        functools.partial(_in_sums, config=in_float32(config)),
        calls=MICRO_BATCHES,
        checked=(x[:, :_CHECKED_TOKENS], weights, dy[:, :_CHECKED_TOKENS]),
    )


def _in_refs(tokens: jax.Array, weights: Weights, cotangents: jax.Array, *, config: MoEConfig) -> Results:
    rounded = quantize_for_training(params_of(weights), config) if config.precision == "w8a8" else None
    sums = jax.tree.map(lambda w: jax.new_ref(jnp.zeros_like(w)), weights)

    def add(_: None, batch: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x, dy = batch
        layer: Any = functools.partial(our_layer, config=config, rounded=rounded)
        y, pullback = jax.vjp(layer, x, weights)
        returned: Any = jax.ad.GradValue()  # type: ignore[attr-defined]
        dx, _ = pullback.with_refs(returned, sums)(dy)  # type: ignore[attr-defined]
        return None, (y, dx)

    _, results = jax.lax.scan(add, None, (tokens, cotangents))
    return jax.tree.map(jax.freeze, sums), results


def _in_sums(tokens: jax.Array, weights: Weights, cotangents: jax.Array, *, config: MoEConfig) -> Results:
    def add(total: Weights, batch: Any) -> tuple[Weights, tuple[jax.Array, jax.Array]]:
        x, dy = batch
        y, pullback = jax.vjp(functools.partial(our_layer, config=config), x, weights)
        dx, gradients = pullback(dy.astype(y.dtype))
        return jax.tree.map(jnp.add, total, gradients), (y, dx)

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), (tokens, cotangents))

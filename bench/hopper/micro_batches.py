"""The gradients of a layer's parameters added up over micro-batches, on one GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.case_data import LAYER_TOP_K, CaseData
from bench.hopper.peers import Implementation
from bench.hopper.training import Weights, config_of, exact, our_layer, params_of, weights_of
from bench.inputs.weights import normal
from bench.model.shapes import GemmShape
from moejax import MoEConfig, quantize_for_training

MICRO_BATCHES = 4

_CHECKED_TOKENS = 128


def micro_batches(s: GemmShape, *, in_8_bits: bool) -> CaseData:
    """The sums of gradients, scanned over `MICRO_BATCHES` of tokens in BF16; a call is one of them.

    Ours are added in refs, and weights that are rounded are rounded before the scan. The peer is our layer as
    `jax.grad` and a sum have it. Parameters, and sums, are float32 in 8 bits and else BF16.
    """
    config, weights = config_of(s, in_8_bits=in_8_bits), weights_of(s, jnp.float32 if in_8_bits else jnp.bfloat16)
    x, dy = (normal(seed, (MICRO_BATCHES, s.G * s.M // LAYER_TOP_K, s.K)) for seed in (0, 4))
    return CaseData(
        (x, weights, dy),
        Implementation("moejax", "moejax", {"": functools.partial(_in_refs, config=config)}),
        (Implementation("jax.grad and sums", "moejax", {"": functools.partial(_in_sums, config=config)}),),
        functools.partial(_in_sums, config=exact(config)),
        calls=MICRO_BATCHES,
        checked=(x[:, :_CHECKED_TOKENS], weights, dy[:, :_CHECKED_TOKENS]),
    )


def _in_refs(x: jax.Array, weights: Weights, dy: jax.Array, *, config: MoEConfig) -> Weights:
    rounded = quantize_for_training(params_of(weights), config) if config.precision == "w8a8" else None
    sums = jax.tree.map(lambda w: jax.new_ref(jnp.zeros_like(w)), weights)

    def add(_: None, batch: Any) -> tuple[None, None]:
        x, dy = batch
        layer: Any = functools.partial(our_layer, x, config=config, rounded=rounded)
        pullback: Any = jax.vjp(layer, weights)[1]
        pullback.with_refs(sums)(dy)
        return None, None

    jax.lax.scan(add, None, (x, dy))
    return jax.tree.map(jax.freeze, sums)


def _in_sums(x: jax.Array, weights: Weights, dy: jax.Array, *, config: MoEConfig) -> Weights:
    def add(total: Weights, batch: Any) -> tuple[Weights, None]:
        x, dy = batch
        y, pullback = jax.vjp(functools.partial(our_layer, x, config=config), weights)
        return jax.tree.map(jnp.add, total, pullback(dy.astype(y.dtype))[0]), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), (x, dy))[0]

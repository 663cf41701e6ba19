"""The cases of `bench.gpu` that are more than products: moving rows by a plan, and whole layers.

A layer is timed by the wall clock, in a jitted chain of layers with weights of their own: what the gaps between its
kernels cost counts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.round_trip import there_and_back
from moejax import MoEConfig, Quantization, fused_experts, quantize, route
from pallas_kernels.plan import make_plan

PERMUTE_EXPERTS, PERMUTE_TOP_K = 128, 2
LAYER_TOP_K = 8


def permute_inputs(num_tokens: int, hidden: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [T, H] in FP16 and router logits [T, E]."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (num_tokens, hidden), jnp.float16)
    return x, jax.random.normal(keys[1], (num_tokens, PERMUTE_EXPERTS), jnp.float32)


def permute(x: jax.Array, logits: jax.Array, *, backend: str = "auto") -> jax.Array:
    """Routes, copies each token to its experts and sums the copies up: x again, as the weights of a token sum to 1."""
    plan_of = functools.partial(make_plan, num_groups=PERMUTE_EXPERTS, backend=backend)
    return there_and_back(x, logits, PERMUTE_TOP_K, plan_of, backend)[0]


def layer_inputs(
    num_tokens: int, num_experts: int, hidden: int, width: int, in_8_bits: bool, num_layers: int
) -> tuple[Any, ...]:
    """Tokens [T, H] in BF16, and for each layer the router's kernel in BF16, w1 [E, 2I, H] and w2 [E, H, I]."""

    @functools.partial(jax.jit, static_argnums=1)
    def weights(key, shape):
        drawn = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[-1] ** -0.5)
        return quantize(drawn, scaling="128x128") if in_8_bits else drawn

    def one_layer(key):
        keys = jax.random.split(key, 3)
        router = jax.random.normal(keys[0], (hidden, num_experts), jnp.bfloat16) * jnp.bfloat16(hidden**-0.5)
        return (
            router,
            weights(keys[1], (num_experts, 2 * width, hidden)),
            weights(keys[2], (num_experts, hidden, width)),
        )

    x = jax.random.normal(jax.random.key(1), (num_tokens, hidden), jnp.bfloat16)
    return x, [one_layer(key) for key in jax.random.split(jax.random.key(2), num_layers)]


def layers(config: MoEConfig, in_8_bits: bool, backend: str = "auto") -> Callable[..., jax.Array]:
    """A function of (x, weights) that applies the layers one after the other, each with a residual."""
    quantization = Quantization() if in_8_bits else None

    @jax.jit  # lowers one layer for all of them
    def one_layer(x, router, w1, w2):
        routing = route(x, router, config)
        y = fused_experts(x, w1, w2, routing.topk_weights, routing.topk_ids, quantization=quantization, backend=backend)
        return x + y

    def run(x, weights):
        for layer in weights:
            x = one_layer(x, *layer)
        return x

    return run

"""Small layers of every router, with parameters that are random throughout, and what the reference wants of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import ROUTERS, MoEConfig
from tests.helpers import float64, normal
from tests.moejax.routers.reference import Setting

BATCH, LENGTH, EXPERTS = 2, 5, 8
WEIGHTS = {"load_balance": 0.7, "sequence_balance": 0.6, "z": 0.5}
CONFIG = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=EXPERTS,
    top_k=2,
    shared_intermediate_size=8,
    load_balance_loss=WEIGHTS["load_balance"],
    sequence_balance_loss=WEIGHTS["sequence_balance"],
    z_loss=WEIGHTS["z"],
    dtype=jnp.float32,
)
OF_TOKENS = dataclasses.replace(CONFIG, sequence_balance_loss=0.0)
"""For routers that would add the loss of sequences to their own."""

IDS = jnp.array([[3, 5, 3, 70, 9], [-1, 5, 12, 1, 1]], jnp.int32)
"""Ids of tokens, one of them padding, one past the hash table."""


def new_layer(name: str, rng: np.random.Generator | None = None, **settings):
    """The layer; with `rng`, all that is zero at first is random too."""
    if name == "hash":
        settings.setdefault("vocabulary", 64)
    if name == "soft_moe":
        settings.setdefault("slots_per_expert", 2)
    config = settings.pop("config", CONFIG if name in ("loss_free", "group_limited") else OF_TOKENS)
    layer = ROUTERS[name](config, rngs=nnx.Rngs(params=0, router=1), **settings)
    if rng is not None:
        for path in ("gate", "noise_gate"):
            if hasattr(layer.router, path):
                kernel = getattr(layer.router, path).kernel
                kernel[...] = jnp.asarray(0.5 * rng.standard_normal(kernel.shape), jnp.float32)
        if hasattr(layer.router, "bias"):
            layer.router.bias[...] = jnp.asarray(0.2 * rng.standard_normal(EXPERTS), jnp.float32)
    return layer


def by_path(state) -> dict[str, np.ndarray]:
    """Arrays of a state in float64, by path."""
    return {".".join(map(str, path)): float64(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def arrays_of(layer) -> dict[str, np.ndarray]:
    """Parameters and state of a layer without its random numbers."""
    return by_path(nnx.state(layer, nnx.Not(nnx.RngState)))


def setting_of(name: str, layer) -> Setting:
    """What the reference has to know. To be asked before the layer is called, which draws noise."""
    noise = None
    if name == "noisy_top_k":
        key = nnx.clone(layer.noise)()
        noise = float64(jax.random.normal(key, (BATCH * LENGTH, EXPERTS), jnp.float32))
    return Setting(
        top_k=CONFIG.top_k,
        sequence_length=LENGTH,
        weights=WEIGHTS,
        noise=noise,
        groups=(4, 2) if name == "group_limited" else (1, 1),
        capacity={"switch": 2, "expert_choice": 3}.get(name, 0),  # ⌈1.25 · 10 / 8⌉ and ⌈10 · 2 / 8⌉
        token_ids=np.asarray(IDS).reshape(-1),
    )


@nnx.jit
def inference(layer, x, ids=None):
    return layer(x, token_ids=ids)


@nnx.jit
def values_and_gradients(layer, x, target):
    def loss(layer, x):
        y, aux = layer(x, token_ids=IDS, train=True)
        return (y * target).sum() + aux.loss, (y, aux)

    return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


@functools.cache
def case(name: str):
    """The layer's arrays and setting, its inputs, and what it makes of them."""
    rng = np.random.default_rng(0)
    layer = new_layer(name, rng)
    arrays, setting = arrays_of(layer), setting_of(name, layer)
    x, target = (normal(rng, BATCH, LENGTH, 16) for _ in range(2))
    (_, (y, aux)), (of_layer, of_x) = values_and_gradients(layer, x, target)
    return arrays, setting, x, target, y, aux, by_path(of_layer) | {"x": float64(of_x)}

"""Small layers of every router, with parameters that are random throughout, and what the reference wants of them."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import ROUTERS, MoE, MoEConfig
from moejax.routers.noisy_top_k import noise_of_tokens
from sharding.tokens import Tokens
from tests.helpers import float64, normal
from tests.moejax.routers.reference import Setting

BATCH, LENGTH, EXPERTS = 2, 5, 8
CONFIG = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=EXPERTS,
    top_k=2,
    shared_intermediate_size=8,
    shared_gate=True,
    dtype=jnp.float32,
)
WEIGHTS = {
    "load_balance": 0.7,
    "importance": 0.8,
    "load": 0.4,
    "specialization": 0.9,
    "sequence_balance": 0.6,
    "z": 0.5,
}
OF_SCORES = ("load_balance", "sequence_balance", "z")
LOSSES = {
    "softmax": OF_SCORES,
    "noisy_top_k": ("importance", "load", "sequence_balance", "z"),
    "switch": OF_SCORES,
    "loss_free": OF_SCORES,
    "group_limited": OF_SCORES,
    "expert_choice": ("z",),
    "soft_moe": (),
    "chain_of_experts": OF_SCORES,
    "hash": (),
    "specialized": ("specialization", "sequence_balance", "z"),
}
"""All that each router has."""
OWN_SETTINGS = {"hash": {"vocabulary": 64}, "soft_moe": {"slots_per_expert": 2}}

IDS = jnp.array([[3, 5, 3, 70, 9], [-1, 5, 12, 1, 1]], jnp.int32)
"""Ids of tokens, one of them padding, one past the hash table."""


def config_of(name: str, config: MoEConfig = CONFIG) -> MoEConfig:
    """With all losses of the router, and biases where it has them."""
    settings = {f"{loss}_loss": WEIGHTS[loss] for loss in LOSSES[name]} | OWN_SETTINGS.get(name, {"router_bias": True})
    return ROUTERS[name](config, **settings)


def new_layer(name: str, rng: np.random.Generator | None = None, config: MoEConfig = CONFIG) -> MoE:
    """The layer; with `rng`, all that is zero at first is random too."""
    layer = MoE(config_of(name, config), rngs=nnx.Rngs(params=0, router=1))
    if rng is not None:
        for part, scale in {"kernel": 0.5, "noise_kernel": 0.5, "bias": 0.2, "correction_bias": 0.2}.items():
            if hasattr(layer.router, part):
                shape = layer.router[part].shape
                layer.router[part][...] = jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
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
        noise = float64(noise_of_tokens(key, Tokens.on_one_chip(BATCH * LENGTH), EXPERTS))
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
def inference(layer, x, ids=None, mask=None, topk_ids=None):
    return layer(x, token_ids=ids, mask=mask, topk_ids=topk_ids, train=False)


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

"""Small layers with the routing of published models, and inputs whose routing no rounding can change."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax import MoEConfig, MoEParams, Quantization, get_preset, route
from moejax.param import Param
from moejax.params import map_table

HIDDEN = 64
WIDTH = 32
BLOCKS = Quantization(lhs_scaling="1x32", rhs_scaling="32x32")


def narrow(name: str, *, hidden: int = HIDDEN, width: int = WIDTH, **changes) -> MoEConfig:
    """The preset with its own experts and routing, and narrow experts whose block scales are small to match."""
    preset = get_preset(name)
    narrowed = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "shared_intermediate_size": width if preset.shared_intermediate_size else 0,
    }
    if width % 128 and preset.quantization.lhs_scaling == "1x128":
        narrowed["quantization"] = BLOCKS
    return get_preset(name, **narrowed | changes)


def random_params(config: MoEConfig, rng: np.random.Generator) -> MoEParams:
    """Parameters of the scale that the module gives them, with biases that are not zero."""

    def draw(row: Param) -> jax.Array:
        inputs = row.shape[row.stacked]
        scale = 0.1 if row.kind in ("bias", "state") else inputs**-0.5
        return jnp.asarray(scale * rng.standard_normal(row.shape, np.float32))

    return map_table(draw, config)


def clear_cut_tokens(num_tokens: int, config: MoEConfig, params: MoEParams, rng: np.random.Generator) -> jax.Array:
    """Tokens [T, H] whose experts stay the same when their logits change a little.

    Programs that add in another order get logits that differ in the last digit. A token on the border between two
    experts would then go to either, which is no error of the layer.
    """
    x = jnp.asarray(rng.standard_normal((2 * num_tokens, config.hidden_size)), config.dtype)
    kernel = params.router["kernel"]
    biases = {name: value for name, value in params.router.items() if name != "kernel"}
    noise = 1 + 1e-4 * jnp.asarray(rng.standard_normal(kernel.shape), jnp.float32)
    chosen = jax.jit(lambda kernel: route(x, kernel, config, **biases).topk_ids)
    ids, moved = chosen(kernel), chosen(kernel * noise)
    stable = np.flatnonzero(np.asarray((ids == moved).all(1)))
    assert stable.size >= num_tokens
    return x[stable[:num_tokens]]

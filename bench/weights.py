"""Random weights for a layer of any size, made where they live."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moejax import MoEConfig, MoEParams, QTensor, params_spec, quantize
from moejax.experts import EXPERT_WEIGHTS, param_shapes

_BIAS = 0.02


def make_params(config: MoEConfig, mesh: Mesh, seed: int) -> MoEParams:
    """Weights of `config` spread over `mesh`, the same for every mesh; 8-bit ones for "w8a8"."""
    shapes = vars(param_shapes(config))
    specs = vars(params_spec(MoEParams(**{name: 0 if shape else None for name, shape in shapes.items()})))
    params = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if shape is not None:
            key = jax.random.fold_in(jax.random.key(seed), index)
            draw = functools.partial(_draw, name, shape, config)
            values = jax.jit(draw, out_shardings=NamedSharding(mesh, specs[name]))(key)
            # A program of its own: fused with the drawing, the rounding would draw every number several times.
            params[name] = _to_8_bits(values, config) if name in EXPERT_WEIGHTS else values
    return MoEParams(**params)


def _draw(name: str, shape: tuple[int, ...], config: MoEConfig, key: jax.Array) -> jax.Array:
    if name == "correction_bias":
        return jnp.zeros(shape, jnp.float32)
    if name.endswith("bias"):
        return _BIAS * jax.random.normal(key, shape, jnp.float32)
    limit = (3 / shape[-2]) ** 0.5  # variance 1 / fan-in
    stored = jnp.float32 if name == "router_kernel" or config.precision == "w8a8" else config.dtype
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit).astype(stored)


def _to_8_bits(values: jax.Array, config: MoEConfig) -> jax.Array | QTensor:
    if config.precision != "w8a8":
        return values
    q = config.quantization
    return jax.jit(lambda values: quantize(values, q.dtype, scaling=q.rhs_scaling).mT, donate_argnums=0)(values)

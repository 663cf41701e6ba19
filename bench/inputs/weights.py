"""Random arrays, and weights for a layer of any size, made where they live."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moejax import MoEConfig, MoEParams, quantize
from moejax.axes import axes_on
from moejax.param import Param
from moejax.params import map_table
from pallas_kernels.quantize import Operand

_BIAS = 0.02


@functools.partial(jax.jit, static_argnames=("shape", "scale", "dtype"))
def normal(
    seed: int, shape: tuple[int, ...], *, scale: float = 1.0, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """Normal numbers of a standard deviation, drawn in their dtype."""
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(scale, dtype)


def make_params(config: MoEConfig, mesh: Mesh, seed: int) -> MoEParams:
    """Weights of `config` spread over `mesh`, the same for every mesh; 8-bit ones for "w8a8"."""
    axes = axes_on(mesh, None, config)
    numbers = itertools.count()

    def make(row: Param) -> Operand:
        key = jax.random.fold_in(jax.random.key(seed), next(numbers))
        sharding = NamedSharding(mesh, axes.spec(row.axes))
        values = jax.jit(_draw, static_argnums=(0, 1), out_shardings=sharding)(row, config, key)
        # A program of its own: fused with the drawing, the rounding would draw every number several times.
        return _to_8_bits(values, row, config) if _is_in_8_bits(row, config) else values

    return map_table(make, config)


def _is_in_8_bits(row: Param, config: MoEConfig) -> bool:
    return row.kind == "kernel" and config.precision == "w8a8"


def _draw(row: Param, config: MoEConfig, key: jax.Array) -> jax.Array:
    if row.kind == "state":
        return jnp.zeros(row.shape, jnp.float32)
    if row.kind == "bias":
        return _BIAS * jax.random.normal(key, row.shape, jnp.float32)
    fan_in = row.k_major(row.shape)[-1]
    limit = (3 / fan_in) ** 0.5  # variance 1 / fan-in
    stored = jnp.float32 if row.kind == "router kernel" or _is_in_8_bits(row, config) else config.dtype
    return jax.random.uniform(key, row.shape, jnp.float32, -limit, limit).astype(stored)


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def _to_8_bits(values: jax.Array, row: Param, config: MoEConfig) -> Operand:
    """One parameter at a time, so that no two of them are there in float32."""
    q = config.quantization
    matrices = jnp.moveaxis(values, -2, -3) if row.has_halves else values
    return quantize(matrices, q.dtype, scaling=q.rhs_scaling).mT

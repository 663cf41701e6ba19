"""The dense feed-forward network as a flax.nnx module.

A GPU runs it in one of three ways:

- where `pallas_kernels.dense_matmul` pays, of some of 16 to 2048 tokens, and no gradient is asked for, by its kernels;
- else few tokens, or few numbers of y, by two dots of XLA's, which cut K in parts: of 64 tokens and 2048 columns the
  experts' kernels would have a tile for every fourth multiprocessor;
- else by the experts' kernels, of which it is a group of one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moejax.axes import partition_by_rules, partition_here
from moejax.checks import check_residual
from moejax.experts import ExpertMath, expert_mlp
from moejax.initial import Initializer, initial
from moejax.models.checks import check_tokens
from moejax.models.config import MLPConfig
from moejax.param import Param
from pallas_kernels import dense_matmul
from pallas_kernels.activations import gated_halves
from pallas_kernels.tracing.concrete import is_less
from pallas_kernels.tracing.target import target_platform
from pallas_kernels.tracing.unless_differentiated import unless_transformed
from sharding.mesh import is_split_here, mesh_at_call, mesh_here
from sharding.partition import Axes, Partition
from sharding.per_chip import per_chip
from sharding.tokens import Tokens

_LECUN = nnx.initializers.lecun_normal()

_FEW_TOKENS = 64
"""Up to which XLA's dots are as fast as the experts' kernels on GPUs, or faster (H200, 2048 by 4096: 7.5 µs in place of
14.8 for down)."""

_FEW_NUMBERS = 1 << 20
"""Numbers of y, T · H, up to which dots are for any T: the experts' tiles would leave most of a GPU idle (H200,
down of 128 tokens, I by H: 3072 by 768 7.8 µs in place of 11.2; 4096 by 2048 9.2 in place of 14.6. Of 512 tokens, I by
H 4096 by 2048, all with the sum onto a residual: 48.0 in place of 56.3)."""


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x)); see `MLPConfig`.

    Over a mesh every chip holds all of it, and tokens are split over every axis.

    Attributes:
      config: the network's MLPConfig.
      gate_up: nnx.Param [H, 2, I], gate and then up.
      down: nnx.Param [I, H].
    """

    def __init__(
        self,
        config: MLPConfig,
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        partition: Partition | None = None,
        kernel_init: Initializer = _LECUN,
    ):
        """Makes the parameters.

        Args:
          config: the network.
          rngs: the stream "params" initialises the parameters.
          mesh: the default is the mesh of `jax.set_mesh`, if any: that in force at a call, else that in force here.
          partition: which axes of the mesh split tokens; see `moejax.MoE`.
          kernel_init: initialises each matrix [in, out].
        """
        self.config = config
        self.mesh = mesh
        self.partition = partition_by_rules() if partition is None else partition
        hidden, width, here = config.hidden_size, config.intermediate_size, mesh_here(mesh)
        self._made_on = here if mesh is None else None

        def make(row: Param) -> nnx.Param[jax.Array]:
            return nnx.Param(initial(row, kernel_init, config.param_dtype, rngs.params(), here))

        self.gate_up = make(Param((hidden, 2, width), ("embed", None, "mlp"), "kernel"))
        self.down = make(Param((width, hidden), ("mlp", "embed"), "kernel"))

    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        """Every token by itself.

        Args:
          x: [B, L, H], BF16, FP16 or float32.
          residual: of the shape of x, BF16, FP16 or float32, what the result is added to, as in a decoder block; None
            for nothing.
          mask: bool [B, L], true for real tokens; None if all are. What is masked comes out as zeros, whatever the
            residual.

        Returns:
          [B, L, H] in the dtype of x; with a residual that has more bits, in its dtype.

        Raises:
          TypeError: an argument is not an array.
          ValueError: shapes or dtypes do not fit, or the mesh would repeat work.
        """
        check_tokens(x, self.config.hidden_size, mask)
        check_residual(residual, x)
        params = {"gate_up": self.gate_up[...], "down": self.down[...]}
        mesh = mesh_here(mesh_at_call(self.mesh, self._made_on, "a network"))
        y, _ = per_chip(
            _on_chip,
            _PerToken(x, residual),
            params,
            self.config,
            leading=x.shape[:-1],
            specs=dict.fromkeys(params, PartitionSpec()),
            mesh=mesh,
            axes=Axes() if mesh is None else partition_here(self.partition).on(mesh),
            mask=mask,
        )
        return y


class _PerToken(NamedTuple):
    x: jax.Array
    residual: jax.Array | None


def _on_chip(
    per_token: _PerToken, params: dict[str, jax.Array], tokens: Tokens, axes: Axes, static: MLPConfig
) -> tuple[jax.Array, None]:
    """The network on the tokens [T, H] of this chip, which holds all of it."""
    del axes  # nothing is split
    (x, residual), config = per_token, static
    dtype = x.dtype if residual is None else jnp.promote_types(x.dtype, residual.dtype)
    kept = tokens.keep(x.astype(config.dtype))  # zeros: a gradient multiplies what is masked by 0
    y = _network(config, kept, residual, params["gate_up"], params["down"], dtype)
    return tokens.keep(y), None


def _network(
    config: MLPConfig,
    x: jax.Array,
    residual: jax.Array | None,
    gate_up: jax.Array,
    down: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The network of x [T, H], onto the residual, in `dtype`."""
    network = _by_dots if _takes_dots(config.backend, *x.shape) else _as_one_expert
    general = functools.partial(_onto, network, config, dtype)
    operands = x, residual, gate_up, down
    if config.backend != "auto" or is_split_here(None, *operands) or not _pays(x, down):
        return general(*operands)
    return unless_transformed(functools.partial(_by_dense_kernels, config, dtype), general, *operands)


def _takes_dots(backend: str, num_tokens: int, hidden_size: int) -> bool:
    if backend != "auto":
        return backend == "xla"
    platform = target_platform()
    are_few = is_less(num_tokens, _FEW_TOKENS + 1) or is_less(num_tokens * hidden_size, _FEW_NUMBERS + 1)
    return platform == "cpu" or (platform == "gpu" and are_few)


def _pays(x: jax.Array, down: jax.Array) -> bool:
    (num_tokens, hidden), width, pays = x.shape, down.shape[0], dense_matmul.pays
    return pays(num_tokens, hidden, width, x.dtype) and pays(num_tokens, width, hidden, x.dtype)


def _by_dense_kernels(
    config: MLPConfig,
    dtype: jax.typing.DTypeLike,
    x: jax.Array,
    residual: jax.Array | None,
    gate_up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    h = dense_matmul.dense_gate_up(
        x, gate_up.astype(x.dtype), activation=config.activation, activation_limit=config.activation_limit
    )
    if residual is not None and residual.dtype == x.dtype == dtype:
        return dense_matmul.dense_matmul(h, down.astype(x.dtype), residual=residual)
    return _sum(dense_matmul.dense_matmul(h, down.astype(x.dtype)), residual, dtype)


def _onto(
    network: Callable[..., jax.Array],
    config: MLPConfig,
    dtype: jax.typing.DTypeLike,
    x: jax.Array,
    residual: jax.Array | None,
    *weights: jax.Array,
) -> jax.Array:
    return _sum(network(config, x, *weights), residual, dtype)


def _sum(y: jax.Array, residual: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    y = y.astype(dtype)
    return y if residual is None else y + residual.astype(dtype)


def _by_dots(config: MLPConfig, x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    # As `dense_matmul` by XLA, which takes no gradient.
    dot = functools.partial(jnp.dot, precision="highest" if x.dtype == jnp.float32 else None)
    h = dot(x, gate_up.reshape(gate_up.shape[0], -1).astype(x.dtype), preferred_element_type=jnp.float32)
    h = gated_halves(h, config.activation, config.activation_limit).astype(x.dtype)
    return dot(h, down.astype(x.dtype))


def _as_one_expert(config: MLPConfig, x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    math = ExpertMath(config.activation, config.activation_limit, None, config.dtype, config.backend)
    return expert_mlp(x, jnp.array([x.shape[0]], jnp.int32), gate_up[None], down[None], math)

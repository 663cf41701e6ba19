"""The dense feed-forward network as a flax.nnx module, by the kernels of the experts: they are a group of one."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moejax.experts import ExpertMath, expert_mlp
from moejax.functional import partition_here
from moejax.initial import Initializer, initial
from moejax.models.checks import check_tokens
from moejax.models.config import MLPConfig
from moejax.param import Param
from sharding.mesh import mesh_here
from sharding.partition import Axes, Partition
from sharding.per_chip import per_chip
from sharding.tokens import Tokens

_LECUN = nnx.initializers.lecun_normal()


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
          mesh: the default is the mesh of `jax.set_mesh`, if any.
          partition: which axes of the mesh split tokens; see `moejax.MoE`.
          kernel_init: initialises each matrix [in, out].
        """
        self.config = config
        self.mesh = mesh
        self.partition = partition
        hidden, width, here = config.hidden_size, config.intermediate_size, mesh_here(mesh)

        def make(row: Param) -> nnx.Param[jax.Array]:
            return nnx.Param(initial(row, kernel_init, config.param_dtype, rngs.params(), here))

        self.gate_up = make(Param((hidden, 2, width), ("embed", None, "mlp"), "kernel"))
        self.down = make(Param((width, hidden), ("mlp", "embed"), "kernel"))

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Every token by itself.

        Args:
          x: [B, L, H], BF16, FP16 or float32.
          mask: bool [B, L], true for real tokens; None if all are. What is masked comes out as zeros.

        Returns:
          [B, L, H] in the dtype of x.

        Raises:
          ValueError: shapes or dtypes do not fit, or the mesh would repeat work.
        """
        check_tokens(x, self.config.hidden_size, mask)
        params = {"gate_up": self.gate_up[...], "down": self.down[...]}
        mesh = mesh_here(self.mesh)
        y, _ = per_chip(
            _on_chip,
            x,
            params,
            self.config,
            leading=x.shape[:-1],
            specs=dict.fromkeys(params, PartitionSpec()),
            mesh=mesh,
            axes=Axes() if mesh is None else partition_here(self.partition).on(mesh),
            mask=mask,
        )
        return y


def _on_chip(
    per_token: jax.Array, params: dict[str, jax.Array], tokens: Tokens, axes: Axes, static: MLPConfig
) -> tuple[jax.Array, None]:
    """The network on the tokens [T, H] of this chip, which holds all of it."""
    del axes  # nothing is split
    x, config = per_token, static
    math = ExpertMath(config.activation, config.activation_limit, None, config.dtype, config.backend)
    group_sizes = jnp.array([x.shape[0]], jnp.int32)
    gate_up, down = params["gate_up"][None], params["down"][None]
    y = expert_mlp(x.astype(config.dtype), group_sizes, gate_up, down, math)
    return tokens.keep(y.astype(x.dtype)), None

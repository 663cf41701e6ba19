"""The layer as a flax.nnx module."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.experts import EXPERT_FIELDS, MoEParams, param_shapes
from moejax.functional import MoEAux, moe
from sharding.exchange_plan import local_experts
from sharding.mesh import EXPERT_AXIS, axis_size, current_mesh

_KERNEL = nnx.initializers.lecun_normal()
_PER_EXPERT = nnx.initializers.lecun_normal(batch_axis=0)
_INITIALIZERS = {
    "router_kernel": _KERNEL,
    "gate_up": _PER_EXPERT,
    "down": _PER_EXPERT,
    "shared_gate_up": _KERNEL,
    "shared_down": _KERNEL,
}


class RouterState(nnx.Variable):
    """Router state that no gradient trains: the correction bias of loss-free balancing."""


def check_mesh(config: MoEConfig, mesh: Mesh | None, expert_axis: str) -> None:
    """Raises ValueError unless the mesh (of `jax.set_mesh` if None), if any, can hold the experts."""
    at_hand = current_mesh() if mesh is None else mesh
    if at_hand is not None:
        local_experts(config.num_experts, axis_size(at_hand, expert_axis))


def layer_param(
    name: str,
    shape: tuple[int, ...],
    config: MoEConfig,
    *,
    rngs: nnx.Rngs,
    mesh: Mesh | None,
    expert_axis: str,
) -> nnx.Param:
    """The parameter `name` of `MoEParams` in its initial value, lying in the mesh (of `jax.set_mesh` if None)."""
    initializer = _INITIALIZERS.get(name, nnx.initializers.zeros)
    split_axis = expert_axis if name in EXPERT_FIELDS else None
    return new_param(initializer, shape, config.param_dtype, rngs=rngs, mesh=mesh, split_axis=split_axis)


def new_param(
    initializer: nnx.initializers.Initializer,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    rngs: nnx.Rngs,
    mesh: Mesh | None,
    split_axis: str | None = None,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A parameter from the stream "params"; in a mesh its first dimension is split over `split_axis`, if given."""
    value = initializer(rngs.params(), shape, dtype)
    if mesh is None and current_mesh() is None:
        return kind(value)
    metadata: dict[str, Any] = {"out_sharding": (split_axis, *(None,) * (len(shape) - 1)), "mesh": mesh}
    return kind(value, **metadata)


class MoE(nnx.Module):
    """A Mixture-of-Experts feed-forward layer.

        layer = MoE(get_preset("mixtral-8x7b"), rngs=nnx.Rngs(0))
        y, aux = layer(x)                  # x [batch, sequence, hidden]
        loss = task_loss(y) + aux.loss

    Created under `jax.set_mesh(mesh)`, or with `mesh=`, its parameters carry their sharding (experts over the
    expert axis) and calls run expert-parallel; without a mesh everything stays on one chip.

    Attributes:
      config: the layer's MoEConfig.
      router_kernel, gate_up, down, …: nnx.Param of the shapes that `moejax.experts.MoEParams` states; None where the
        configuration has no such parameter.
      correction_bias: RouterState [E], or None.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, expert_axis: str = EXPERT_AXIS):
        """Makes the parameters.

        Args:
          config: the layer.
          rngs: its "params" stream initialises the kernels (LeCun normal); biases start at zero.
          mesh: default is that of `jax.set_mesh`, if any.
          expert_axis: axis of the mesh that the experts are split over.

        Raises:
          ValueError: the mesh has no such axis, or it does not divide the experts.
        """
        self.config = config
        self.mesh = mesh
        self.expert_axis = expert_axis
        check_mesh(config, mesh, expert_axis)
        shapes = param_shapes(config)
        for field in dataclasses.fields(MoEParams):
            shape = getattr(shapes, field.name)
            setattr(self, field.name, None if shape is None else self._variable(field.name, shape, rngs))

    def _variable(self, name: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Variable:
        if name == "correction_bias":
            return RouterState(jnp.zeros(shape, jnp.float32))
        return layer_param(name, shape, self.config, rngs=rngs, mesh=self.mesh, expert_axis=self.expert_axis)

    def params(self) -> MoEParams:
        """The parameters as arrays, for `moejax.moe`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(MoEParams)}
        return MoEParams(**{name: None if v is None else v[...] for name, v in values.items()})

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEAux]:
        """X [..., H] -> y [..., H] in the dtype of x, and MoEAux(losses, load). See `moejax.moe`."""
        return moe(x, self.params(), self.config, mesh=self.mesh, expert_axis=self.expert_axis)

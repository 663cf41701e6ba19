"""The same layer as a flax.linen module."""

from flax import linen
from flax.nnx import bridge
from jax.sharding import Mesh

from moejax import layer
from moejax.config import MoEConfig
from sharding.mesh import EXPERT_AXIS


def MoE(
    config: MoEConfig, *, mesh: Mesh | None = None, expert_axis: str = EXPERT_AXIS, name: str | None = None
) -> linen.Module:
    """A linen module with the parameters and the call of `moejax.MoE`.

        layer = moejax.linen.MoE(get_preset("mixtral-8x7b"))
        variables = layer.init(jax.random.key(0), x)
        y, aux = layer.apply(variables, x)

    Parameters are in the collection "params", the correction bias in "RouterState". Made under a mesh, parameters are
    boxed with their sharding, as `linen.get_partition_spec` expects.
    """
    return bridge.to_linen(layer.MoE, config, mesh=mesh, expert_axis=expert_axis, name=name)

"""The same layer as a flax.linen module."""

from typing import Any

import flax
from flax import linen, nnx
from flax.nnx import bridge
from jax.sharding import Mesh

from moejax import layer
from moejax.config import MoEConfig
from moejax.params import EXPERT_WEIGHTS, MoEParams, quantize_params
from sharding.partition import Partition


def MoE(
    config: MoEConfig,
    *,
    mesh: Mesh | None = None,
    partition: Partition | None = None,
    name: str | None = None,
    **settings: Any,
) -> linen.Module:
    """A linen module with the parameters and the call of `moejax.MoE`.

        layer = moejax.linen.MoE(get_preset("mixtral-8x7b"))
        variables = layer.init(jax.random.key(0), x)
        y, aux = layer.apply(variables, x)
        y, aux = layer.apply(variables, x, rngs={"router": key})  # to train with a noisy router
        y, aux = layer.apply(variables, x, train=False)           # to use it

    Parameters are in the collection "params"; what no gradient trains (the correction bias, the table of hash routing)
    is in "RouterState". Call `apply` under jit: otherwise flax initialises all parameters again in each call. Under a
    mesh, parameters are boxed as `linen.Partitioned`, as `linen.get_partition_spec` and `linen.scan` expect.

    Args:
      config: the layer.
      mesh: as for `moejax.MoE`.
      partition: which axes of the mesh split what.
      name: of the module.
      **settings: further ones of `moejax.MoE`, such as `kernel_init`.
    """
    if "rngs" in settings:
        raise TypeError("a linen module takes its random numbers in init(key, x), not rngs")
    return bridge.ToLinen(
        _Layer,
        args=(config,),
        kwargs=flax.core.freeze({"mesh": mesh, "partition": partition, **settings}),
        metadata_fn=_partitioned,
        name=name,
    )


class _Layer(layer.MoE):
    """The layer as flax makes it in every call; its noise comes from that call's stream "router", if there is one.

    Given no stream, `apply` would draw the same noise every time, from a default that flax makes; `init` draws none.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, **settings: Any):
        super().__init__(config, rngs=rngs, **settings)
        if "router" not in rngs:
            self.noise = None
            is_init = "default" not in rngs
            self.deterministic = self.deterministic or is_init


def quantized(variables: dict[str, Any], config: MoEConfig) -> dict[str, Any]:
    """The variables of a layer for serving in 8 bits, for the module of the same configuration.

    Args:
      variables: those that `init` of a `MoE` returned, trained or not.
      config: the layer.

    Returns:
      Variables whose experts' weights are QTensors, in the collection "QuantizedParam".
    """
    params = linen.meta.unbox(variables["params"])
    weights = {name: params[name] for name in EXPERT_WEIGHTS if name in params}
    rest = {name: value for name, value in params.items() if name not in weights}
    missing = {name: None for name in ("gate_up", "down") if name not in weights}
    in_8_bits = quantize_params(MoEParams(router=None, **weights, **missing), config)
    return {**variables, "params": rest, "QuantizedParam": {name: getattr(in_8_bits, name) for name in weights}}


def _partitioned(variable: nnx.Variable[Any]) -> Any:
    """A variable as linen boxes it: with the mesh axes of its dimensions, to which transformations add their own."""
    names = variable.get_metadata().get("out_sharding")
    value = variable.get_value()
    return value if names is None else linen.Partitioned(value, names=names, mesh=variable.get_metadata().get("mesh"))

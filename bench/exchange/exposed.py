"""What an exchange costs the layer around it: the time of the layer that is not its gate's and its experts'."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.expert_parallel.decode_step import TOLERANCE, run_decode
from bench.inputs.weights import make_params
from bench.measure.errors import check
from moejax import MoEConfig
from moejax.functional import axes_on

_NOT_MOVING = ("gate", "shared", "routed_gate_up", "routed_down")


def exposed_us(
    x: jax.Array, router: Any, config: MoEConfig, mesh: Mesh, seed: int, say: Callable[[str], None]
) -> float:
    """The layer's time less that of its gate and experts, each timed alone as `bench.decode` does.

    Args:
      x: [ep, T, H], as `bench.exchange.measure.Tokens` has it.
      router: [H, E], with which the layer makes the choices of the case.
      config: the layer, whose router is a plain top-k.
      mesh: its devices.
      seed: of the weights.
      say: is told what is being done.

    Raises:
      ValueError: the layer differs from the dense oracle.
    """
    params = make_params(config, mesh, seed)
    assert isinstance(params.router, dict), params.router
    kernel = params.router["kernel"]
    own = jax.make_array_from_callback(kernel.shape, kernel.sharding, lambda index: router[index].astype(kernel.dtype))
    params = dataclasses.replace(params, router={**params.router, "kernel": own})
    tokens = NamedSharding(mesh, PartitionSpec(axes_on(mesh, None, config).tokens))
    flat = jax.jit(lambda x: x.reshape(-1, x.shape[-1]), out_shardings=tokens)
    run = run_decode(flat(x), params, config, mesh, say)
    check(run.relative_error, TOLERANCE)
    seconds = run.stages.seconds
    return (run.wall_seconds - sum(seconds[name] for name in _NOT_MOVING if name in seconds)) * 1e6

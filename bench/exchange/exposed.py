"""What an exchange costs the layer around it: the time of the layer that is not its gate's and its experts'."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from bench.exchange.tokens import Tokens
from bench.expert_parallel.decode_step import TOLERANCE, run_decode
from bench.inputs.weights import make_params
from bench.measure.errors import check
from moejax import with_changes
from moejax.functional import axes_on

_NOT_MOVING = ("gate", "shared", "routed_gate_up", "routed_down")


def exposed_us(tokens: Tokens, transport: str, seed: int, say: Callable[[str], None]) -> float:
    """The layer's time less that of its gate and experts, each timed alone as `bench.decode` does.

    Args:
      tokens: of a layer whose router is a plain top-k.
      transport: its name.
      seed: of the weights.
      say: is told what is being done.

    Raises:
      ValueError: the layer differs from the dense oracle.
    """
    config, mesh = with_changes(tokens.config, transport=transport), tokens.mesh
    params = make_params(config, mesh, seed)
    assert isinstance(params.router, dict), params.router
    kernel = params.router["kernel"]
    own = jax.make_array_from_callback(
        kernel.shape, kernel.sharding, lambda index: tokens.router[index].astype(kernel.dtype)
    )
    params = dataclasses.replace(params, router={**params.router, "kernel": own})
    by_token = NamedSharding(mesh, PartitionSpec(axes_on(mesh, None, config).tokens))
    flat = jax.jit(lambda x: x.reshape(-1, x.shape[-1]), out_shardings=by_token)
    run = run_decode(flat(tokens.x), params, config, mesh, say)
    check(run.relative_error, TOLERANCE)
    seconds = run.stages.seconds
    return (run.wall_seconds - sum(seconds[name] for name in _NOT_MOVING if name in seconds)) * 1e6

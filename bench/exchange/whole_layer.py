"""The layer that an exchange is part of: over several chips, and on one chip with as many experts and tokens.

The difference is what the exchange costs, less what of it is hidden behind other work.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bench.exchange.measure import Watch
from bench.exchange.tokens import Tokens
from bench.expert_parallel.chain import chain_of_layers
from bench.expert_parallel.decode_step import TOLERANCE, error_of_some_tokens
from bench.inputs.weights import make_params
from bench.measure.clock import wall_times
from bench.measure.errors import check
from bench.one_chip.cases import Case
from moejax import MoEConfig, MoEParams, moe, with_changes
from moejax.axes import axes_on
from sharding.mesh import make_mesh


def time_over_chips(tokens: Tokens, transport: str, *, length: int, repeats: int, seed: int, watch: Watch) -> float:
    """Microseconds of a call of the layer over all chips, by the wall clock.

    Args:
      tokens: of the case, on the mesh; its router is a plain top-k.
      transport: name of what carries the rows.
      length: layers in one program.
      repeats: measurements.
      seed: of the weights.
      watch: limits the time of each step.

    Raises:
      ValueError: the layer differs from the dense oracle.
    """
    config, mesh = with_changes(tokens.config, transport=transport), tokens.mesh
    by_token = NamedSharding(mesh, PartitionSpec(axes_on(mesh, None, config).tokens))
    x = jax.jit(lambda x: x.reshape(-1, x.shape[-1]), out_shardings=by_token)(tokens.x)
    params = _with_router(make_params(tokens.config, mesh, seed), tokens.router)
    with watch("the layer's result"):
        y = jax.block_until_ready(jax.jit(lambda x, params: moe(x, params, config, mesh=mesh)[0])(x, params))
        check(error_of_some_tokens(x, y, params, config, mesh)[0], TOLERANCE)
    with watch("the whole layer"):
        return wall_times(chain_of_layers(config, mesh, length), x, params, repeats=repeats, calls=length).median_us


def time_on_one_chip(
    case: Case, config: MoEConfig, ep: int, *, length: int, repeats: int, seed: int, watch: Watch
) -> float | None:
    """Microseconds of a call of the layer on one chip, with as many experts and tokens as each of several has.

    Args:
      case: over all chips; one gets its own tokens, with the same kind of load on its own experts.
      config: of the layer over all chips.
      ep: how many these are.
      length: layers in one program.
      repeats: measurements.
      seed: of the weights.
      watch: limits the time.

    Returns:
      None where a chip's share has fewer experts than a token chooses.
    """
    num_local = config.num_experts // ep
    if num_local < config.top_k:
        return None
    own, mesh = with_changes(config, num_experts=num_local), make_mesh(1, devices=jax.local_devices()[:1])
    tokens = Tokens.of(dataclasses.replace(case, tokens=case.tokens // ep, experts=num_local), own, mesh)
    params = _with_router(make_params(own, mesh, seed), tokens.router)
    with watch("the layer on one chip"):
        chain = chain_of_layers(own, mesh, length)
        return wall_times(chain, tokens.x[0], params, repeats=repeats, calls=length).median_us


def _with_router(params: MoEParams, router: np.ndarray) -> MoEParams:
    """Parameters whose router makes the choices of `router` [H, E]."""
    assert isinstance(params.router, dict), params.router
    kernel = params.router["kernel"]
    own = jax.make_array_from_callback(kernel.shape, kernel.sharding, lambda index: router[index].astype(kernel.dtype))
    return dataclasses.replace(params, router={**params.router, "kernel": own})

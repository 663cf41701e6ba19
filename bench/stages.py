"""Wall time of each stage of an expert-parallel layer, by running the stages one at a time.

The layer itself runs them as one program, in as many rounds as the load needs. Here every stage is a program of its
own on what the stage before it left on each chip, and a slab is as large as the fullest one, so that one round holds
all rows. The times add up to more than the layer's: nothing overlaps, and each stage ends with a wait for all chips.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from moejax import MoEConfig, MoEParams, params_spec
from moejax.experts import down_projection, gate_up_projection, shared_mlp
from moejax.router import route
from pallas_kernels.combine import combine
from sharding.exchange_dense import announce, return_rows, send_rows
from sharding.exchange_plan import local_experts, plan_departure, plan_destinations
from sharding.mesh import EXPERT_AXIS

_REPEATS = 3


def time_stages(x: jax.Array, params: MoEParams, config: MoEConfig, mesh: Mesh) -> dict[str, float]:
    """Seconds of each stage for tokens x [T, H] on `mesh`, the median of a few runs; compilation left out.

    Returns:
      "gate", "shared" (when there is a shared expert), "dispatch", "routed_gate_up", "routed_down", "combine".
    """
    ep = mesh.shape[EXPERT_AXIS]
    num_local = local_experts(config.num_experts, ep)
    wire_scaling = config.wire_scaling if config.precision == "w8a8" else None
    clock = _Clock(mesh, params)

    def gate(x, params):
        routing = route(
            x, params.router_kernel, config, bias=params.router_bias, correction_bias=params.correction_bias
        )
        return routing.topk_ids, routing.topk_weights

    x = x.reshape(ep, -1, config.hidden_size)
    topk_ids, topk_weights = clock("gate", gate, x)
    if params.shared_gate_up is not None:
        clock("shared", lambda x, p: shared_mlp(x, p.shared_gate_up, p.shared_down, config), x)
    fullest = jax.jit(lambda ids: jax.vmap(lambda ids: plan_destinations(ids, num_local, ep)[1].group_sizes.max())(ids))
    slab = max(1, int(fullest(topk_ids).max()))

    def dispatch(x, topk_ids, _):
        destinations, by_rank = plan_destinations(topk_ids, num_local, ep)
        departure, for_experts = plan_departure(topk_ids, destinations, by_rank, num_local, slab, 0)
        exchange = announce(departure, for_experts, num_local, EXPERT_AXIS)
        return exchange, send_rows(x, exchange, EXPERT_AXIS, wire_scaling, config.backend)

    exchange, rows = clock("dispatch", dispatch, x, topk_ids)

    def gate_up(rows, exchange, p):
        return gate_up_projection(rows, exchange.arrival.group_sizes, p.gate_up, config, bias=p.gate_up_bias)

    def down(h, exchange, p):
        return down_projection(h, exchange.arrival.group_sizes, p.down, config, bias=p.down_bias)

    def back(rows, exchange, topk_weights, _):
        slots = return_rows(rows, exchange, EXPERT_AXIS, config.backend)
        return combine(slots, exchange.departure, topk_weights, backend=config.backend)

    h = clock("routed_gate_up", gate_up, rows, exchange)
    rows = clock("routed_down", down, h, exchange)
    clock("combine", back, rows, exchange, topk_weights)
    return clock.seconds


class _Clock:
    """Runs a stage on every chip and notes its time. Values between stages have a leading dimension for the chips."""

    def __init__(self, mesh: Mesh, params: MoEParams):
        self.mesh = mesh
        self.params = params
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, stage: Callable[..., Any], *args: Any) -> Any:
        def on_chip(params: MoEParams, *args: Any) -> Any:
            own = jax.tree.map(lambda leaf: leaf[0], args)
            return jax.tree.map(lambda leaf: leaf[None], stage(*own, params))

        by_chip = PartitionSpec(EXPERT_AXIS)
        program = jax.jit(
            jax.shard_map(
                on_chip,
                mesh=self.mesh,
                in_specs=(params_spec(self.params), *(by_chip for _ in args)),
                out_specs=by_chip,
                check_vma=False,
            )
        )
        run = functools.partial(program, self.params, *args)
        result = jax.block_until_ready(run())
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - begin)
        self.seconds[name] = statistics.median(times)
        return result

"""One movement of the tokens of a case: three chains timed, and their results checked.

A wrong transport is not a fast one. So the rows that arrive for each expert, and the sum that comes back, are held
against plain arithmetic.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.exchange.chains import chained, never
from bench.exchange.movements import ByTransport, Movement, in_16_bits, movement, on_the_wire
from bench.exchange.tokens import Tokens
from bench.exchange.traffic import Traffic, rows_between, traffic_of
from bench.expert_parallel.decode_step import TOLERANCE
from bench.measure.clock import CallTime, wall_times
from bench.measure.errors import check, norm_error
from bench.measure.every_chip import on_every_chip
from moejax.axes import axes_on
from sharding.mesh import EXPERT_AXIS

STEPS = ("send", "give_back", "together")

_SUMS_TOLERANCE = 1e-3
"""Of the sum of an expert's rows in float32: they are copies, but added in another order."""

_SUMS_TOLERANCE_IN_8_BITS = 1e-2
"""The same of rows that another program rounds again, to compare: a value between two FP8 numbers may be one off."""

Watch = Callable[[str], AbstractContextManager[None]]
"""Given a step in words, limits the time of what is done inside."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """What was measured of a movement.

    Attributes:
      times: of a call, by the names in `STEPS`.
      traffic: bytes.
    """

    times: dict[str, CallTime]
    traffic: Traffic


def measure(name: str, tokens: Tokens, *, length: int, repeats: int, watch: Watch) -> Moved:
    """Times the chains of `length` calls of a movement of `bench.exchange.movements`, and checks what they give.

    Raises:
      ValueError: a result is wrong.
    """
    config, mesh = tokens.config, tokens.mesh
    axes = axes_on(mesh, None, config)
    fullest = int(rows_between(tokens.topk_ids, config.num_experts, axes.ep).max())
    moved = movement(name, config, axes, tokens.x.shape[1], fullest)
    with watch("plan"):
        rows, plan = jax.block_until_ready(on_every_chip(moved.ready, mesh)(tokens.x, tokens.ids))
    limit, times = never(mesh), {}

    def time(step: str, function: Callable[..., Any], *args: Any) -> Any:
        with watch(step):
            program = on_every_chip(chained(function, length), mesh)
            times[step] = wall_times(program, limit, *args, repeats=repeats, calls=length)
            return jax.block_until_ready(program(limit, *args))

    arrived = time("send", moved.send, rows, plan)
    with watch("check of send"):
        if isinstance(moved, ByTransport):
            limit_of_sums = _SUMS_TOLERANCE if moved.way.wire is None else _SUMS_TOLERANCE_IN_8_BITS
            check(_error_of_arrived(arrived, plan, tokens, moved), limit_of_sums)
        back = jax.jit(in_16_bits)(arrived)
    del arrived
    time("give_back", moved.give_back, back, plan)
    del back

    def together(moving: Any, fixed: Any) -> jax.Array:
        return moved.together(*moving, *fixed)

    y = time("together", together, (rows, tokens.ids), (plan, tokens.weights))
    with watch("check of the result"):
        expected = on_every_chip(moved.expected, mesh)(rows, tokens.weights)
        check(float(_largest_error_of_a_row(y, expected)), TOLERANCE)
    platform = mesh.devices.flat[0].platform
    return Moved(times, traffic_of(name, config, moved.way, tokens.topk_ids, platform))


@jax.jit
def _largest_error_of_a_row(y: jax.Array, expected: jax.Array) -> jax.Array:
    """Of [ep, N, H]: ‖row − right row‖ / ‖right row‖ of the worst; a single wrong token among many shows."""
    return _worst(jax.vmap(jax.vmap(norm_error))(y, expected))


def _worst(errors: jax.Array) -> jax.Array:
    """The largest, infinite if one is NaN: a maximum over chips may pass over it."""
    return jnp.where(jnp.isnan(errors), jnp.inf, errors).max()


def _error_of_arrived(rows: jax.Array, plan: Any, tokens: Tokens, moved: Movement) -> float:
    """How far the sum of an expert's rows [ep, C, H] is from that of the tokens that chose it, for the worst expert."""
    way, num_experts = moved.way, tokens.config.num_experts
    num_local = way.placement.num_local

    def error(x: jax.Array, ids: jax.Array, rows: jax.Array, plan: Any) -> jax.Array:
        x, rows = in_16_bits(on_the_wire(x, way)).astype(jnp.float32), in_16_bits(rows)
        own = sum(jax.ops.segment_sum(x, ids[:, k], num_experts) for k in range(ids.shape[1]))
        wanted = lax.psum_scatter(own, EXPERT_AXIS, tiled=True)
        ends = jnp.cumsum(plan.group_sizes)
        place = jnp.arange(rows.shape[0])
        expert = jnp.searchsorted(ends, place, side="right")  # rows past the last are nobody's, and may be NaN
        used = jnp.where((place < ends[-1])[:, None], rows.astype(jnp.float32), 0)
        found = jax.ops.segment_sum(used, expert, num_local)
        return _worst(jax.vmap(norm_error)(found, wanted))

    errors = on_every_chip(error, tokens.mesh)(tokens.x, tokens.ids, rows, plan)
    return float(jnp.max(errors))

"""What is measured: the transports of the layer, and beside them the bare collectives, which carry rows and no more.

Each is a `Movement`, whose functions run on one chip inside shard_map. Shapes are those of `sharding.exchange`; N are
the rows that a bare collective carries, ready to leave.

    transports              x [T, H] -> quantised, sorted by expert, carried, [C, H]; and back in BF16, summed [T, H]
    lax.ragged_all_to_all   the same rows, sorted and quantised before -> where they belong; and back
    lax.all_to_all          as many rows of a balanced load, in equal slabs, whatever the load is; and back
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax import MoEConfig
from moejax.stages import way_of
from pallas_kernels.all_to_all import all_to_all
from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize import Operand, QTensor, dequantize
from sharding.collectives import as_bytes
from sharding.exchange import Way, pick_transport
from sharding.exchange.exact import Exact
from sharding.exchange.room import slab_and_rounds
from sharding.partition import Axes

BARE = ("lax.all_to_all", "lax.ragged_all_to_all")


def movement(name: str, config: MoEConfig, axes: Axes, num_tokens: int, slab: int) -> "Movement":
    """The movement that is called `name`: a transport, or one of `BARE`.

    Chips have the room that the layer gives them for `num_tokens` each, or for slabs of `slab` rows where the layer
    might need several rounds.
    """
    way = way_of(config, axes)
    own, rounds = slab_and_rounds((num_tokens, config.top_k), way)
    way = dataclasses.replace(way, slab=own if rounds == 1 else slab)
    if name == "lax.all_to_all":
        return BareDense(way)
    if name == "lax.ragged_all_to_all":
        return BareRagged(way)
    return ByTransport(dataclasses.replace(way, transport=name))


@dataclasses.dataclass(frozen=True)
class Movement(abc.ABC):
    """A way to move the tokens of a case to the chips of their experts and back: a bare collective's, or overridden.

    Attributes:
      way: how rows travel; `way.slab` holds all that one chip has for another, so that one round does.
    """

    way: Way

    @abc.abstractmethod
    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[Any, Any]:
        """Tokens x [T, H] and choices [T, K] -> what `send` takes: rows, and a plan."""

    @abc.abstractmethod
    def send(self, rows: Any, plan: Any) -> Operand:
        """Rows to the chips of their experts."""

    @abc.abstractmethod
    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """Rows as `send` gave them, `in_16_bits`, back."""

    def together(self, rows: Any, ids: jax.Array, plan: Any, weights: jax.Array) -> jax.Array:
        """All of it: there, into 16 bits where it is 8, and back."""
        del ids, weights
        return self.give_back(in_16_bits(self.send(rows, plan)), plan)

    def expected(self, rows: Any, weights: jax.Array) -> jax.Array:
        """What `together` must give, by plain arithmetic on one chip: the rows as they were."""
        del weights
        return in_16_bits(rows)


class ByTransport(Movement):
    """A transport, as the layer uses it where no gradient is asked for. The experts are the identity."""

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
        """See `Movement`."""
        return x, pick_transport(self.way).plan_rows(ids, self.way)

    def send(self, rows: jax.Array, plan: Any) -> Operand:
        """See `Movement`; rounding them is part of it."""
        return pick_transport(self.way).send(on_the_wire(rows, self.way), plan, self.way)

    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """See `Movement`."""
        return pick_transport(self.way).give_back(rows, plan, self.way)

    def together(self, rows: jax.Array, ids: jax.Array, plan: Any, weights: jax.Array) -> jax.Array:
        """Plan, send, give back, combine; the plan is one of its own."""
        transport = pick_transport(self.way)
        plan = transport.plan_rows(ids, self.way)
        slots = super().together(rows, ids, plan, weights)
        return transport.combine_slots(slots, plan, weights, self.way, preferred_element_type=rows.dtype)

    def expected(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """See `Movement`: each token times the sum of its weights."""
        return in_16_bits(on_the_wire(rows, self.way)).astype(jnp.float32) * weights.sum(1, keepdims=True)


class BareDense(Movement):
    """`lax.all_to_all` of equal slabs."""

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[Operand, tuple[()]]:
        """As many rows as a balanced load has, in ep slabs."""
        rows = self.way.axes.ep * balanced_slab(ids.size, self.way.axes.ep)
        return on_the_wire(x[jnp.arange(rows) % x.shape[0]], self.way), ()

    def send(self, rows: Operand, plan: tuple[()]) -> Operand:
        """See `Movement`."""
        return jax.tree.map(lambda leaf: self.give_back(leaf, plan), rows)

    def give_back(self, rows: jax.Array, plan: tuple[()]) -> jax.Array:
        """See `Movement`; the same as there."""
        del plan
        return as_bytes(lambda x: lax.all_to_all(x, self.way.axes.expert, 0, 0, tiled=True), rows)


class BareRagged(Movement):
    """`lax.ragged_all_to_all`: what the transport "ragged" carries, and how."""

    carrier = Exact("xla")

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[Operand, Any]:
        """The rows by expert, [T·K, H]."""
        plan = self.carrier.plan_rows(ids, self.way)
        return dispatch(on_the_wire(x, self.way), plan.departure, backend=self.way.backend), plan

    def send(self, rows: Operand, plan: Any) -> Operand:
        """See `Movement`."""
        return all_to_all(rows, plan.blocks, plan.num_rows, self.way.axes.expert, backend=self.carrier.backend)

    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """See `Movement`."""
        return self.carrier.carry_back(rows, plan, self.way)


def balanced_slab(choices: int, ep: int) -> int:
    """Rows of a chip, which has so many choices, for each chip, where the load is balanced."""
    return -(-choices // ep)


def on_the_wire(x: jax.Array, way: Way) -> Operand:
    """Rows as they leave."""
    return x if way.wire is None else way.wire.rounded(x, backend=way.backend).in_8_bits


def in_16_bits(rows: Operand) -> jax.Array:
    """Rows as they travel back."""
    return dequantize(rows, jnp.bfloat16) if isinstance(rows, QTensor) else rows

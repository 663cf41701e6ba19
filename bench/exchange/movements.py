"""What is measured: the transports of the layer, and beside them the bare collectives, which carry rows and no more.

Each is a `Movement`, whose functions run on one chip inside shard_map. Shapes are those of `sharding.exchange`; N are
the rows that a bare collective carries, ready to leave.

    transports              x [T, H] -> quantised, sorted by expert, carried, [C, H]; and back in BF16, summed [T, H]
    lax.ragged_all_to_all   the same rows, sorted and quantised before -> where they belong; and back
    lax.all_to_all          as many rows of a balanced load, in equal slabs, whatever the load is; and back
"""

import abc
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from moejax import MoEConfig
from moejax.stages import way_of
from pallas_kernels.all_to_all import all_to_all
from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize import Operand, QTensor, dequantize
from sharding.collectives import as_bytes
from sharding.exchange import Transport, Way, pick_transport
from sharding.partition import Axes

BARE = ("lax.all_to_all", "lax.ragged_all_to_all")


class Movement(Protocol):
    """A way to move the tokens of a case to the chips of their experts and back."""

    @property
    def way(self) -> Way:
        """How rows travel; `way.slab` holds all that one chip has for another."""

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[Any, Any]:
        """Tokens x [T, H] and choices [T, K] -> what `send` takes: rows, and a plan."""

    def send(self, rows: Any, plan: Any) -> Any:
        """Rows to the chips of their experts."""

    def give_back(self, rows: Any, plan: Any) -> Any:
        """Rows in 16 bits, as `arrived` has them, back."""

    def together(self, rows: Any, ids: jax.Array, plan: Any, weights: jax.Array) -> jax.Array:
        """All of it from the choices on: for a transport plan, send, give back, combine."""

    def expected(self, rows: Any, weights: jax.Array) -> jax.Array:
        """What `together` must give, by plain arithmetic on one chip."""


def movement(name: str, config: MoEConfig, axes: Axes, slab: int) -> Movement:
    """The movement that is called `name`: a transport, or one of `BARE`."""
    way = dataclasses.replace(way_of(config, axes), slab=slab)
    if name == "lax.all_to_all":
        return BareDense(way)
    if name == "lax.ragged_all_to_all":
        return BareRagged(dataclasses.replace(way, transport="ragged"))
    return ByTransport(dataclasses.replace(way, transport=name))


@dataclasses.dataclass(frozen=True)
class ByTransport:
    """See `Movement`. The experts between there and back are the identity."""

    way: Way

    @property
    def transport(self) -> Transport:
        """What carries the rows."""
        return pick_transport(self.way)

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
        """See `Movement`."""
        return x, self.transport.plan_rows(ids, self.way)

    def send(self, rows: jax.Array, plan: Any) -> Operand:
        """See `Movement`; rows travel as the layer sends them where no gradient is asked for."""
        return self.transport.send(on_the_wire(rows, self.way), plan, self.way)

    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """See `Movement`."""
        return self.transport.give_back(rows, plan, self.way)

    def together(self, rows: jax.Array, ids: jax.Array, plan: Any, weights: jax.Array) -> jax.Array:
        """See `Movement`; it makes its own plan."""
        plan = self.transport.plan_rows(ids, self.way)
        slots = self.give_back(in_16_bits(self.send(rows, plan)), plan)
        return self.transport.combine_slots(slots, plan, weights, self.way, preferred_element_type=rows.dtype)

    def expected(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """See `Movement`."""
        return in_16_bits(on_the_wire(rows, self.way)).astype(jnp.float32) * weights.sum(1, keepdims=True)


class _Bare(abc.ABC):
    """What the bare collectives have in common."""

    way: Way

    @abc.abstractmethod
    def send(self, rows: Operand, plan: Any) -> Operand:
        """See `Movement`."""

    @abc.abstractmethod
    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """See `Movement`."""

    def together(self, rows: Operand, ids: jax.Array, plan: Any, weights: jax.Array) -> jax.Array:
        """See `Movement`: there, into 16 bits where it is 8, and back."""
        del ids, weights
        return self.give_back(in_16_bits(self.send(rows, plan)), plan)

    def expected(self, rows: Operand, weights: jax.Array) -> jax.Array:
        """See `Movement`: the rows as they were."""
        del weights
        return in_16_bits(rows)


@dataclasses.dataclass(frozen=True)
class BareDense(_Bare):
    """`lax.all_to_all` of equal slabs; see `Movement`."""

    way: Way

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[Operand, tuple[()]]:
        """As many rows as a balanced load has, in ep slabs."""
        rows = self.way.axes.ep * balanced_slab(ids.size, self.way.axes.ep)
        return on_the_wire(x[jnp.arange(rows) % x.shape[0]], self.way), ()

    def send(self, rows: Operand, plan: tuple[()]) -> Operand:
        """See `Movement`."""
        del plan
        return jax.tree.map(self._carried, rows)

    def give_back(self, rows: jax.Array, plan: tuple[()]) -> jax.Array:
        """See `Movement`."""
        return self._carried(rows)

    def _carried(self, x: jax.Array) -> jax.Array:
        return as_bytes(lambda x: lax.all_to_all(x, self.way.axes.expert, 0, 0, tiled=True), x)


@dataclasses.dataclass(frozen=True)
class BareRagged(_Bare):
    """`lax.ragged_all_to_all` by the plan of the transport "ragged"; see `Movement`."""

    way: Way

    def ready(self, x: jax.Array, ids: jax.Array) -> tuple[Operand, Any]:
        """The rows by expert, [T·K, H]."""
        plan = pick_transport(self.way).plan_rows(ids, self.way)
        return dispatch(on_the_wire(x, self.way), plan.departure, backend=self.way.backend), plan

    def send(self, rows: Operand, plan: Any) -> Operand:
        """See `Movement`."""
        return all_to_all(rows, plan.blocks, plan.num_rows, self.way.axes.expert, backend="xla")

    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """See `Movement`."""
        leaving = plan.departure.order.shape[0]
        return all_to_all(rows, plan.blocks.back, leaving, self.way.axes.expert, backend="xla")


def balanced_slab(choices: int, ep: int) -> int:
    """Rows of a chip, which has so many choices, for each chip, where the load is balanced."""
    return -(-choices // ep)


def on_the_wire(x: jax.Array, way: Way) -> Operand:
    """Rows as they leave."""
    return x if way.wire is None else way.wire.rounded(x).in_8_bits


def in_16_bits(rows: Operand) -> jax.Array:
    """Rows as they travel back."""
    return dequantize(rows, jnp.bfloat16) if isinstance(rows, QTensor) else rows

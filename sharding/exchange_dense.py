"""The exchange over `lax.all_to_all`: equal slabs to every peer, rows out as they are or in 8 bits.

Rows come back in the dtype that the experts give them.

Runs wherever XLA runs. It sends whole slabs, filled or not; transports that send only what exists share its plan.
"""

import dataclasses
import functools

import jax
from jax import lax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor, dequantize
from sharding.exchange_plan import ExchangePlan, plan_arrival
from sharding.tensor_parallel import gather_columns, sum_columns, to_columns
from sharding.wire import Wire, as_bytes


@dataclasses.dataclass(frozen=True)
class Route:
    """The way of rows between chips.

    Attributes:
      axis: the axes of the experts.
      tensor: the axes that share the width of each expert; rows then travel in columns, a part on each of their chips.
      wire: what rows are on the way out; None sends them as they are.
      backend: of the gathers that pack and sort the rows.
    """

    axis: tuple[str, ...]
    tensor: tuple[str, ...] = ()
    wire: Wire | None = None
    backend: str = "auto"


def announce(departure: Plan, experts: jax.Array, num_local_experts: int, axis: tuple[str, ...]) -> ExchangePlan:
    """Tells the peers along mesh axes `axis` what comes to them, and learns what comes from them.

    Args:
      departure: from `plan_departure`, as `experts` is.
      experts: int32 [ep·S], the local expert of the row in each slot, −1 in empty ones.
      num_local_experts: L.
      axis: the axes of the experts.
    """
    return ExchangePlan(departure, plan_arrival(_all_to_all(experts, axis), num_local_experts))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def send_rows(x: jax.Array, plan: ExchangePlan, route: Route) -> jax.Array:
    """Brings every token's row to the ranks of its experts.

    Quantising, exchanging and dequantising are one step to autodiff, with faces in the dtype of `x`: an 8-bit payload
    between two differentiated functions would round its gradient to 8 bits. The gradient travels back unquantised.

    Args:
      x: [T, H], BF16, FP16 or float32.
      plan: from `announce`; with `route.tensor`, of the tokens of all chips of that group.
      route: the way.

    Returns:
      [ep·S, H] in the dtype of `x`, sorted by local expert; rows past plan.arrival.group_sizes are zeros.
    """
    rows = _sent(x if route.wire is None else route.wire.load(x), plan, route)
    return dequantize(rows, x.dtype) if isinstance(rows, QTensor) else rows


@send_rows.defjvp
def _send_rows_jvp(route, primals, tangents):
    x, plan = primals
    dx, _ = tangents
    return send_rows(x, plan, route), _sent(dx, plan, route)


def _sent[Rows: jax.Array | QTensor](x: Rows, plan: ExchangePlan, route: Route) -> Rows:
    """The rows as they are. Their gradient travels as `return_rows` has it, and is summed as `combine` does."""
    has_row_scales = isinstance(x, QTensor) and x.scale.shape[1] == 1
    if route.tensor:
        x = to_columns(x, route.tensor)
    slots = dispatch(x, plan.departure, backend=route.backend)
    arrived = jax.tree.map(lambda leaf: _all_to_all(leaf, route.axis), slots)
    rows = dispatch(arrived, plan.arrival, backend=route.backend)
    return gather_columns(rows, route.tensor, has_row_scales=has_row_scales) if route.tensor else rows


def return_rows(rows: jax.Array, plan: ExchangePlan, route: Route) -> jax.Array:
    """Sends what the experts made of each row back to where the row came from, never below BF16.

    Args:
      rows: [ep·S, H] in the order in which `send_rows` gave them; with `route.tensor`, partial sums.
      plan: the same plan.
      route: the way.

    Returns:
      [ep·S, H], the slots of plan.departure, for `combine(…, plan.departure, weights)`; with `route.tensor` this chip's
      columns of them, [ep·S, H / tp].
    """
    if route.tensor:
        rows = sum_columns(rows, route.tensor).astype(rows.dtype)
    return _all_to_all(combine(rows, plan.arrival, backend=route.backend), route.axis)


def _all_to_all(slots: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """Slab d of [ep·S, …] goes to rank d; slab s of the result came from rank s."""
    return as_bytes(lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True), slots)


__all__ = ["Route", "announce", "return_rows", "send_rows"]

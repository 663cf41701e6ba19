"""The exchange over `lax.all_to_all`: equal slabs to every peer, rows out in FP8 or as they are, rows back in BF16.

Runs wherever XLA runs. It sends whole slabs, filled or not; transports that send only what exists share its plan.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor, Scaling, dequantize, quantize
from pallas_kernels.target import target_platform
from sharding.exchange_plan import ExchangePlan, plan_arrival

WIRE_DTYPE = "float8_e4m3fn"
"""What rows travel in when `wire_scaling` asks for 8 bits; their scales travel beside them in float32."""


def announce(departure: Plan, experts: jax.Array, num_local_experts: int, axis: str) -> ExchangePlan:
    """Tells the peers along mesh axis `axis` what comes to them, and learns what comes from them.

    Args:
      departure: from `plan_departure`, as `experts` is.
      experts: int32 [ep·S], the local expert of the row in each slot, −1 in empty ones.
      num_local_experts: L.
      axis: the expert axis.
    """
    return ExchangePlan(departure, plan_arrival(_all_to_all(experts, axis), num_local_experts))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def send_rows(x: jax.Array, plan: ExchangePlan, axis: str, wire_scaling: Scaling | None, backend: str) -> jax.Array:
    """Brings every token's row to the ranks of its experts.

    Quantising, exchanging and dequantising are one step to autodiff, with faces in the dtype of `x`: an 8-bit payload
    between two differentiated functions would round its gradient to 8 bits. The gradient travels back unquantised.

    Args:
      x: [T, H], BF16 or float32.
      plan: from `announce`.
      axis: the expert axis.
      wire_scaling: None sends rows as they are; else they travel in FP8 with this scaling ("1x128", "per_row").
      backend: of the gather that packs and sorts the rows.

    Returns:
      [ep·S, H] in the dtype of `x`, sorted by local expert; rows past plan.arrival.group_sizes are zeros.
    """
    payload = x if wire_scaling is None else quantize(x, WIRE_DTYPE, scaling=wire_scaling)
    rows = _sent(payload, plan, axis, backend)
    return dequantize(rows, x.dtype) if isinstance(rows, QTensor) else rows


@send_rows.defjvp
def _send_rows_jvp(axis, wire_scaling, backend, primals, tangents):
    x, plan = primals
    dx, _ = tangents
    return send_rows(x, plan, axis, wire_scaling, backend), _sent(dx, plan, axis, backend)


def _sent[Rows: jax.Array | QTensor](x: Rows, plan: ExchangePlan, axis: str, backend: str) -> Rows:
    """The rows as they are. Their gradient travels as `return_rows` has it, and is summed as `combine` does."""
    slots = dispatch(x, plan.departure, backend=backend)
    arrived = jax.tree.map(lambda leaf: _all_to_all(leaf, axis), slots)
    return dispatch(arrived, plan.arrival, backend=backend)


def return_rows(rows: jax.Array, plan: ExchangePlan, axis: str, backend: str) -> jax.Array:
    """Sends what the experts made of each row back to where the row came from, never below BF16.

    Args:
      rows: [ep·S, H] in the order in which `send_rows` gave them.
      plan: the same plan.
      axis: the expert axis.
      backend: of the gather that unsorts the rows.

    Returns:
      [ep·S, H], the slots of plan.departure, for `combine(…, plan.departure, weights)`.
    """
    return _all_to_all(combine(rows, plan.arrival, backend=backend), axis)


def _all_to_all(slots: jax.Array, axis: str) -> jax.Array:
    """Slab d of [ep·S, …] goes to rank d; slab s of the result came from rank s."""
    # Not every collective library knows FP8, and bytes are bytes. TPUs do, and looking at them as others costs a pass.
    if slots.dtype.itemsize == 1 and target_platform() != "tpu":
        exchanged = lax.all_to_all(lax.bitcast_convert_type(slots, jnp.uint8), axis, 0, 0, tiled=True)
        return lax.bitcast_convert_type(exchanged, slots.dtype)
    return lax.all_to_all(slots, axis, 0, 0, tiled=True)


__all__ = ["WIRE_DTYPE", "announce", "return_rows", "send_rows"]

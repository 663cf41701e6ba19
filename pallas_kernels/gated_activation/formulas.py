"""What `pallas_kernels.activations` computes, and its derivatives, in as few instructions as a GPU has for them.

With σ the logistic function and Φ the normal distribution, act(gate) is gate · σ(gate) for silu, gate · σ(1.702 gate)
for swigluoai, gate · σ(2u) for gelu_tanh (as 1 + tanh(u) = 2σ(2u)), gate · Φ(gate) for gelu, and max(gate, 0)² for
relu2. Kernels that compute approximately take one instruction for a quotient and one for an exponential, both correct
to some 1e-7, but a hyperbolic tangent is not: correct to 5e-4, it would be too coarse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import OAI_ALPHA, Activation

_SQRT_HALF = 0.5**0.5
_DENSITY = 0.3989422804014327  # of the normal distribution at 0: 1 / sqrt(2π)
_TANH_SCALE, _TANH_CUBE = 1.5957691216057308, 0.044715  # 2 sqrt(2 / π)


class Gated(NamedTuple):
    """Of act(gate) · up and where it is differentiated, all float32.

    Attributes:
      value: act(gate) · up.
      by_gate: its derivative by gate.
      by_up: its derivative by up.
    """

    value: jax.Array
    by_gate: jax.Array
    by_up: jax.Array


def value_of(gate: jax.Array, up: jax.Array, activation: Activation, limit: float | None) -> jax.Array:
    """act(gate) · up of float32 values; see `pallas_kernels.activations.gated`."""
    return _gated(gate, up, activation, limit, with_slope=False)[0]


def with_derivatives(gate: jax.Array, up: jax.Array, activation: Activation, limit: float | None) -> Gated:
    """The same with its derivatives, which are those that `jax.vjp` gives."""
    value, act, slope, factor = _gated(gate, up, activation, limit, with_slope=True)
    by_gate, by_up = slope * factor, act
    if limit is not None:
        by_gate, by_up = by_gate * _below(gate, limit), by_up * _below(jnp.abs(up), limit)
    return Gated(value, by_gate, by_up)


def _gated(gate, up, activation: Activation, limit: float | None, *, with_slope: bool):
    """act(gate) · factor, act(gate), act'(gate) or None, and the factor: up, or up + 1."""
    if limit is not None:
        gate = jnp.minimum(gate, limit)
        up = jnp.minimum(jnp.maximum(up, -limit), limit)
    act, slope = _activated(gate, activation, with_slope)
    factor = up + 1.0 if activation == "swigluoai" else up
    return act * factor, act, slope, factor


def _activated(gate, activation: Activation, with_slope: bool):
    """act(gate), and act'(gate) or None."""
    if activation == "relu2":
        positive = jnp.maximum(gate, 0.0)
        return positive * positive, 2.0 * positive if with_slope else None
    if activation == "gelu":
        below = 0.5 * (1.0 + lax.erf(gate * _SQRT_HALF))
        act = gate * below
        return act, below + gate * (_DENSITY * jnp.exp(-0.5 * (gate * gate))) if with_slope else None
    if activation == "gelu_tanh":
        square = gate * gate
        share = _logistic(gate * (_TANH_SCALE + (_TANH_SCALE * _TANH_CUBE) * square))
        inner_slope = _TANH_SCALE + (3 * _TANH_SCALE * _TANH_CUBE) * square if with_slope else None
    else:
        inner_slope = 1.0 if activation == "silu" else OAI_ALPHA
        share = _logistic(gate if activation == "silu" else OAI_ALPHA * gate)
    act = gate * share
    return act, share + act * (1.0 - share) * inner_slope if with_slope else None


def _below(x, limit: float):
    """How much of a cotangent passes a clamp: at its edge, half of it."""
    return jnp.where(x < limit, 1.0, jnp.where(x == limit, 0.5, 0.0))


def _logistic(x):
    return 1.0 / (1.0 + jnp.exp(-x))

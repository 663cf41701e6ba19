"""The gated activations of expert MLPs: act(gate) · up, on float32 values of a tile or a whole array.

    silu       SwiGLU of Llama, Mixtral, DeepSeek, Qwen      gate · σ(gate) · up
    gelu       GeGLU with the exact error function
    gelu_tanh  GeGLU with the tanh approximation (Gemma)
    swigluoai  gpt-oss                                      gate · σ(1.702 · gate) · (up + 1)
    relu2      squared ReLU (BitNet b1.58)                  max(gate, 0)² · up

`limit` clamps before the activation: gate from above, up from both sides (gpt-oss: 7.0).
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"]

OAI_ALPHA = 1.702
_SQRT_HALF = 0.5**0.5


def _swigluoai(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate * jax.nn.sigmoid(OAI_ALPHA * gate) * (up + 1)


def _gelu(gate: jax.Array) -> jax.Array:
    # Like jax.nn.gelu, which takes erfc, however, and kernels for GPUs have no erfc.
    return 0.5 * gate * (1 + jax.lax.erf(gate * _SQRT_HALF))


def _relu2(gate: jax.Array) -> jax.Array:
    positive = jnp.maximum(gate, 0)  # not jax.nn.relu, whose gradient rule kernels for GPUs of jax 0.11 do not take
    return positive * positive


def _gated_by(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda gate, up: activation(gate) * up


_GATED: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": _gated_by(jax.nn.silu),
        "gelu": _gated_by(_gelu),
        "gelu_tanh": _gated_by(functools.partial(jax.nn.gelu, approximate=True)),
        "swigluoai": _swigluoai,
        "relu2": _gated_by(_relu2),
    }
)


def check_activation(activation: str, limit: float | None, *, name: str = "activation") -> None:
    """Raises ValueError unless `activation` is known and `limit` is None or positive; `name` is for the message."""
    if activation not in _GATED:
        hint = " ('silu' is SwiGLU, 'gelu' is GeGLU: all of them are gates)" if "glu" in str(activation) else ""
        raise ValueError(f"unknown {name} {activation!r}; expected one of {', '.join(_GATED)}{hint}")
    if limit is not None and not limit > 0:
        raise ValueError(f"{name}_limit must be positive, or None for no clamp, got {limit}")


def gated(gate: jax.Array, up: jax.Array, activation: Activation, limit: float | None = None) -> jax.Array:
    """act(gate) · up, elementwise, in the dtype of the inputs.

    Args:
      gate: [..., I].
      up: [..., I].
      activation: see the module's page.
      limit: clamps gate to at most `limit` and up to ±`limit` first; None for no clamp.
    """
    if limit is not None:
        gate = jnp.minimum(gate, limit)
        up = jnp.clip(up, -limit, limit)
    return _GATED[activation](gate, up)


def gated_halves(h: jax.Array, activation: Activation, limit: float | None = None) -> jax.Array:
    """act(h[..., :I]) · h[..., I:] of pre-activations [..., 2I], gate first."""
    gate, up = jnp.split(h, 2, axis=-1)
    return gated(gate, up, activation, limit)

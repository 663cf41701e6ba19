"""Rotary positions (RoPE, arXiv 2104.09864), in the order of Llama's checkpoints: element i turns with i + D/2."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Turns the pairs (i, i + D/2) of every head by positions · theta^(−2i/D).

    Args:
      x: [B, L, N, D], D even.
      positions: integer [L], or [B, L].
      theta: base of the frequencies.

    Returns:
      [B, L, N, D] in the dtype of x, computed in float32.
    """
    width = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(width, dtype=jnp.float32) / width)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    halves = x.reshape(*x.shape[:-1], 2, width).astype(jnp.float32)
    # Not as two halves that are joined: of those XLA would make a kernel for queries and one for keys.
    turned = halves * cos[..., None, :] + halves[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    return turned.astype(x.dtype).reshape(x.shape)

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
    a, b = x[..., :width].astype(jnp.float32), x[..., width:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)

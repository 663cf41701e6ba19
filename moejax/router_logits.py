"""The router's matrix product."""

import jax

from pallas_kernels.float32_matmul import float32_matmul


def router_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product x [T, H] · kernel [H, E] -> float32 [T, E], with the precision of float32 operands."""
    return float32_matmul(x, kernel)

"""Scales of 8-bit operands in the layouts that the TPU kernel reads."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Unsupported
from pallas_kernels.quantize import Operand, QTensor

_DEPTH = 128
"""What the depth of a scale block must be a multiple of: the kernel cuts K only there."""


def lhs_scales(lhs: Operand) -> tuple[jax.Array, jax.Array | None, jax.Array | None, int]:
    """Splits lhs [M, K] into its values and its scales.

    Returns:
      The values; scales [M, 1] or [M, K/block], if any; one scale for all instead, if it has that; and the depth of a
      block, 0 without.

    Raises:
      Unsupported: a scale covers less of K than 128, or no whole number of 128.
    """
    if not isinstance(lhs, QTensor):
        return lhs, None, None, 0
    (num_rows, depth), (rows, depths) = lhs.shape, lhs.scale.shape
    if (rows, depths) == (1, 1):
        return lhs.values, None, lhs.scale.reshape(()), 0
    scale = jnp.repeat(lhs.scale, num_rows // rows, axis=0)
    if depths == 1:
        return lhs.values, scale, None, 0
    return lhs.values, scale, None, _block("lhs", lhs, depth, depths)


def rhs_scales(
    rhs: Operand, k_major: bool, tensor_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, Literal["channel", "block"] | None, int]:
    """Splits rhs [G, K, N] ([G, N, K] if K-major) into values and scales; these include the one scale of lhs, if any.

    Returns:
      The values; scales [G, 1, N] or [G, K/block, N], if any; their kind; and the depth of a block, 0 without.

    Raises:
      Unsupported: a scale covers less of K than 128, or no whole number of 128.
    """
    kernel = rhs.mT if k_major else rhs  # shapes only: the values stay as they lie
    num_groups, depth, columns = kernel.shape
    if isinstance(rhs, QTensor):
        values = rhs.values
        scale = rhs.scale.mT if k_major else rhs.scale
        scale = jnp.repeat(scale, num_groups // scale.shape[0], axis=0)
        scale = jnp.repeat(scale, columns // scale.shape[2], axis=2)
        if tensor_scale is not None:
            scale = scale * tensor_scale
    elif tensor_scale is not None:
        values, scale = rhs, jnp.full((num_groups, 1, columns), tensor_scale)
    else:
        return rhs, None, None, 0
    if scale.shape[1] == 1:
        return values, scale, "channel", 0
    return values, scale, "block", _block("rhs", rhs, depth, scale.shape[1])


def _block(name: str, operand: Any, depth: int, count: int) -> int:
    block = depth // count
    if block % _DEPTH:
        raise Unsupported(
            f"TPU kernels apply scales to blocks of K that are a multiple of {_DEPTH} deep, got {block}: {name} has "
            f"values {list(operand.shape)} and scale {list(operand.scale.shape)}"
        )
    return block

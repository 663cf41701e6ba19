"""The product on an NVIDIA GPU: of few rows by a kernel of its own, else in parts by the matrix units."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.float32_matmul.gpu import few_rows, parts
from pallas_kernels.on_gpu.device import hopper_chip

TAKES_SYMBOLS = True
"""Sizes need not be numbers: products in parts have no kernel to be cut for them; see `pallas_kernels.backend`."""


def float32_matmul(lhs: jax.Array, rhs: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    """See `pallas_kernels.float32_matmul.float32_matmul`."""
    chip = _hopper()
    config = None if chip is None else few_rows.pick(lhs, rhs, out_dtype, chip)
    if config is None:
        return parts.float32_matmul(lhs, rhs, out_dtype=out_dtype)
    return few_rows.float32_matmul(lhs, rhs, config)


def _hopper() -> Chip | None:
    """The Hopper that is traced for, or None."""
    try:
        return hopper_chip("float32_matmul")
    except Unsupported:
        return None


__all__ = ["float32_matmul"]

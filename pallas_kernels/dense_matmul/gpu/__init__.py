"""The products on an NVIDIA GPU."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.dense_matmul import reference
from pallas_kernels.dense_matmul.gpu.kernel import dense_product
from pallas_kernels.dense_matmul.gpu.problem import BLOCK_N, Problem
from pallas_kernels.dense_matmul.gpu.sizes import Sizes
from pallas_kernels.dense_matmul.gpu.tiling import pick
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

_DEPTH_UNIT = 8
"""What divides K, in numbers of 16 bits, as the copy engine needs it."""

_LEAST_ROWS = 16
"""Of 8, XLA takes 18.2 µs for a network of 2048 and 4096, ours 18.0; of 16, 19.1 and 18.0."""

_MOST_ROWS = 2048
"""More were not measured."""

_FILLED_ROWS = 2 * WGMMA_ROWS
_LEAST_FILLED = 0.8
"""Share of a multiple of so many rows that more than 64 must fill. With 0.75, 192 rows, a network of 2048 and 4096 took
8 % less than XLA's, one of 4096 and 14336 21 % more; between that and 1 none was measured."""

_LEAST_WEIGHTS = 1 << 19
"""Numbers K · N: a block of 32 tokens whose products have at most half as many took 20.4 µs, 15.7 without."""

_MOST_BARE_NUMBERS = 1 << 20
"""Of a bare product's result. Of more XLA does not cut K: it has one kernel, too, for 0.83 to 1.12 of the time."""

_FEW_ROWS = 256
"""Up to which a bare product may have more numbers."""

_MOST_BARE_NUMBERS_OF_FEW_ROWS = 3 << 19
"""256 by 6144, of which XLA took 11.1 to 15.5 µs and ours 10.9; more were not measured."""


def dense_matmul(lhs: jax.Array, rhs: jax.Array, *, residual: jax.Array | None) -> jax.Array:
    """See `pallas_kernels.dense_matmul.dense_matmul`."""
    sizes = _cut(lhs, rhs, windows=1, adds=residual is not None)
    if sizes is None:
        return reference.dense_matmul(lhs, rhs, residual=residual)
    return dense_product(lhs, rhs, residual, None, sizes)


def dense_gate_up(
    lhs: jax.Array, rhs: jax.Array, *, activation: Activation, activation_limit: float | None
) -> jax.Array:
    """See `pallas_kernels.dense_matmul.dense_gate_up`."""
    sizes = _cut(lhs, rhs, windows=2, adds=False)
    if sizes is None:
        return reference.dense_gate_up(lhs, rhs, activation=activation, activation_limit=activation_limit)
    return dense_product(lhs, rhs.reshape(rhs.shape[0], -1), None, (activation, activation_limit), sizes)


def pays(num_rows: int, depth: int, columns: int, dtype: jnp.dtype, *, is_bare: bool) -> bool:
    """See `pallas_kernels.dense_matmul.pays`."""
    _require(depth, columns, dtype)
    if not _LEAST_ROWS <= num_rows <= _MOST_ROWS:
        return False
    is_filled = num_rows <= WGMMA_ROWS or num_rows >= _LEAST_FILLED * _FILLED_ROWS * pl.cdiv(num_rows, _FILLED_ROWS)
    most = _MOST_BARE_NUMBERS_OF_FEW_ROWS if num_rows <= _FEW_ROWS else _MOST_BARE_NUMBERS
    return is_filled and depth * columns >= _LEAST_WEIGHTS and (not is_bare or num_rows * columns <= most)


def _cut(lhs: jax.Array, rhs: jax.Array, *, windows: int, adds: bool) -> Sizes | None:
    """How the kernel cuts a product; None if there is nothing to multiply."""
    (rows, depth), columns = lhs.shape, rhs.shape[-1]
    chip = _require(depth, columns, lhs.dtype)
    if 0 in (rows, depth, columns):
        return None
    problem = Problem(rows, depth, columns, windows, adds, lhs.dtype)
    return Sizes(problem, pick(chip, problem))


def _require(depth: int, columns: int, dtype: jnp.dtype) -> Chip:
    """The chip; raises Unsupported for what the kernel does not take."""
    if dtype.itemsize != 2:
        raise Unsupported(f"dense_matmul: the kernel multiplies BF16 and FP16, got {dtype}")
    if depth % _DEPTH_UNIT or columns % BLOCK_N:
        needed = f"K must be a multiple of {_DEPTH_UNIT}, N of {BLOCK_N}"
        raise Unsupported(f"dense_matmul: {needed}, got {depth} and {columns}")
    return hopper_chip("dense_matmul")

"""Numbers of 8 bits that the GPU's matrix stores transpose: two neighbours of a column as one number of 16 bits.

The matrix stores transpose numbers of 16 bits. Of two rows that lie side by side as such numbers, the even one in the
lower half, they make what were neighbours in a column neighbours in a row: no byte moves alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import single_view, swizzled


class Transposed(NamedTuple):
    """The two views of transposed tiles: as they are stored, and as they are copied.

    Interpret mode keeps apart the views of a buffer; with `single_view` all is in pairs, the kernel's result too.

    Attributes:
      pairs: uint16 [..., columns, rows / 2], two neighbours in a row as one number, the first in its lower half.
      values: 8 bits [..., columns, rows], in each of the dtypes that are copied from there.
    """

    pairs: Any
    values: Sequence[Any]

    @classmethod
    def describe(cls, shape: tuple[int, ...], *dtypes: jnp.dtype) -> Any:
        """The buffer to allocate for tiles [..., columns, rows]."""
        pairs = swizzled((*shape[:-1], shape[-1] // 2), jnp.uint16, any_row=False)
        if single_view.get():
            return pairs
        return plgpu.RefUnion(pairs, *(swizzled(shape, dtype, any_row=False) for dtype in dtypes))

    @classmethod
    def of(cls, ref: Any, dtypes: int = 1) -> "Transposed":
        """The views of a buffer that `describe` described, with how many dtypes."""
        return cls(ref, [ref] * dtypes) if single_view.get() else cls(ref[0], ref[1:])


def transposed_type(rows: int, columns: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """The type of a kernel's transposed result, to which `Transposed.values` are copied."""
    if single_view.get():
        return jax.ShapeDtypeStruct((rows, columns // 2), jnp.uint16)
    return jax.ShapeDtypeStruct((rows, columns), dtype)


def transposed_result(found: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """That result in 8 bits."""
    return found if found.dtype == dtype else lax.bitcast_convert_type(found, dtype).reshape(found.shape[0], -1)


def side_by_side(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two 8-bit arrays as one of 16 bits."""
    low, high = (lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16) for x in (low, high))
    return low | (high << 8)

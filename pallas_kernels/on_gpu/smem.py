"""Tiles in shared memory, in the swizzled layout that `wgmma` reads.

`wgmma` wants rows of 128 bytes as tiles of 8 rows. In memory that is the same as plain rows of 128 bytes, which the
copy engine can write from any first row on; as tiles it can only start at every eighth row, and only in a matrix with a
multiple of 8 rows. So one buffer has two views: `copied` for the copy engine, `tiled` for everything else.

Interpret mode keeps apart the views of a buffer that the hardware keeps together; `single_view` gives it one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tracing.override import Override

SWIZZLE = 128
"""Bytes of a row of a tile."""

single_view = Override[bool]("single_view")
"""Kernels traced inside `with single_view(True)` keep to one view a buffer, as interpret mode needs."""


class Views(NamedTuple):
    """The two views of one buffer."""

    copied: Any
    tiled: Any

    @classmethod
    def of(cls, ref: Any) -> "Views":
        """The views of a buffer that `swizzled` described with `any_row`."""
        return cls(ref, ref) if single_view.get() else cls(*ref)


def ints(*shape: int) -> Any:
    """A buffer of integers."""
    return plgpu.SMEM(shape, jnp.int32)


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, any_row: bool = True) -> Any:
    """A buffer of tiles [..., rows, columns].

    Args:
      shape: with 32, 64 or 128 bytes of columns, or a multiple of 128 if not `any_row`.
      dtype: of the elements.
      any_row: whether copies may begin at any row; see `Views.of`.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row_bytes = min(SWIZZLE, shape[-1] * itemsize)
    swizzle = plgpu.SwizzleTransform(row_bytes)  # type: ignore[abstract]
    tiling = plgpu.TilingTransform((8, row_bytes // itemsize))  # type: ignore[abstract]
    tiled = (tiling, swizzle)
    if not any_row or single_view.get():
        return plgpu.SMEM(shape, dtype, transforms=tiled)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
        plgpu.SMEM(shape, dtype, transforms=tiled),
    )

"""64 keys as a column and 64 as a row of a tile, in a warpgroup's registers: what the sorts are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""Keys that are compared with as many others at a time."""

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""The layouts of vectors along the rows and along the columns of a tile."""

_STORES_AT_ONCE = 8


def in_tiles(keys: jax.Array, multiple: int = TILE) -> jax.Array:
    """Keys [N] as [tiles, 64], with −1 up to a multiple of `multiple` keys."""
    return jnp.pad(keys, (0, -keys.shape[0] % multiple), constant_values=-1).reshape(-1, TILE)


def scatter(out: Any, places: Any, values: Any) -> None:
    """out[places[i]] = values[i] for the 64 places that are not negative; both lie in shared memory."""
    plgpu.commit_smem()

    def store(i, _):
        some = [i * _STORES_AT_ONCE + j for j in range(_STORES_AT_ONCE)]
        for place, value in [(places[j], values[j]) for j in some]:  # all loaded before the first is stored

            @pl.when(place >= 0)
            def _(place=place, value=value):
                out[place] = value

    lax.fori_loop(0, TILE // _STORES_AT_ONCE, store, None)
    plgpu.commit_smem()


def zeros() -> jax.Array:
    """A tile of zeros."""
    return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.int32), plgpu.Layout.WGMMA)


def iota(axis: int) -> jax.Array:
    """The numbers of a tile's rows (0), or of its columns (1)."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)


def vector_iota(layout: Any = ROWS) -> jax.Array:
    """The numbers of 64 rows, or columns."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout)


def along_rows(vector: jax.Array) -> jax.Array:
    """A tile with a number for each row."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), (0,))


def along_columns(vector: jax.Array) -> jax.Array:
    """A tile with a number for each column."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), (1,))


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a result."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def smem(*shape: int) -> Any:
    """Integers in shared memory."""
    return plgpu.SMEM(shape, jnp.int32)


def launch(body: Any, out_type: Any, scratch: list[Any], *, blocks: int) -> Any:
    """The kernel, to be called with its operands; its blocks have one warpgroup each."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="counting_sort",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )

"""Weights rounded to 8 bits in both layouts on NVIDIA GPUs, in one pass.

    floor in time = (bytes of the weights + bytes of the values, of each layout) / HBM bandwidth

A block takes a tile of 128 rows and columns, which has one scale, at a time. The copy engine brings the even and the
odd rows of the tile as two tiles of 64 rows, which the threads take into registers whole: as soon as they have them,
the next tile is on its way. There they find the scale, round, and put the two rounded rows of a pair side by side, as
numbers of 16 bits. The GPU's matrix stores transpose these, and what were neighbours in a column are neighbours in a
row then: no byte moves alone. The copy engine takes the results away.

Several blocks on a core see to it that copies go on while others round.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.rounding import require_fp8
from pallas_kernels.on_gpu.smem import single_view, swizzled
from pallas_kernels.quantize import SCALE_BLOCK, QTensor, scale_of


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      blocks_per_core: blocks that run on a core at once.
      num_stages: tiles of a block that are on their way at once.
    """

    blocks_per_core: int
    num_stages: int = 1


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      tiles: ring [stages, 2, 64, 128] of tiles, even rows and odd rows.
      full: [stages] barriers, complete when a tile has landed.
      n_last: the result [2, 64, 128], even rows and odd rows; or None.
      k_major: the transposed result [128, 128], or None; see `_Transposed`.
    """

    tiles: Any
    full: Any
    n_last: Any
    k_major: Any


def quantize_transpose(
    weights: jax.Array, *, dtype: jnp.dtype, k_major: bool, n_last: bool, config: Config | None = None
) -> tuple[QTensor | None, QTensor | None]:
    """See `pallas_kernels.quantize_transpose.reference.quantize_transpose`; `config` is for tuning.

    Raises:
      Unsupported: a dtype that the kernel does not take, or sizes that are no multiples of 128.
    """
    chip = hopper_chip("quantize_transpose")
    _check(weights, dtype)
    groups, depth, columns = weights.shape
    row_tiles, column_tiles = depth // SCALE_BLOCK, columns // SCALE_BLOCK
    num_tiles = groups * row_tiles * column_tiles
    config = config or _config(weights.dtype)
    blocks = min(num_tiles, _most_blocks(chip, config))
    # An even row and the odd one after it as one: what is copied is a matrix, whatever G, K and N are.
    pairs = groups * depth // 2, 2 * columns
    outs = {"scale": jax.ShapeDtypeStruct((groups, row_tiles, column_tiles), jnp.float32)}
    if n_last:
        outs["n_last"] = jax.ShapeDtypeStruct(pairs, dtype)
    if k_major:
        outs["k_major"] = _transposed_type(groups * columns, depth, dtype)

    def body(x, *refs):
        *out_refs, scratch = refs
        out = dict(zip(outs, out_refs, strict=True))
        first = lax.axis_index("block")

        def place(step):
            """Group, row tile and column tile of the tile of a step."""
            tile = first + step * blocks
            row, column = lax.div(tile, column_tiles), lax.rem(tile, column_tiles)
            return lax.div(row, row_tiles), lax.rem(row, row_tiles), column

        def halves(ref, group, row, column):
            """The even and the odd rows of a tile of a matrix that has pairs of rows."""
            rows = pl.ds(
                pl.multiple_of((group * row_tiles + row) * (SCALE_BLOCK // 2), SCALE_BLOCK // 2), SCALE_BLOCK // 2
            )
            starts = (column * SCALE_BLOCK, columns + column * SCALE_BLOCK)
            return [ref.at[rows, pl.ds(pl.multiple_of(start, SCALE_BLOCK), SCALE_BLOCK)] for start in starts]

        def fetch(step):
            slot = lax.rem(step, config.num_stages)
            for i, half in enumerate(halves(x, *place(step))):
                plgpu.copy_gmem_to_smem(half, scratch.tiles.at[slot, i], scratch.full.at[slot])

        steps = lax.div(num_tiles - 1 - first, jnp.int32(blocks)) + 1

        def fetch_if_any(step, _=None):
            pl.when(step < steps)(lambda: fetch(step))

        def one_tile(step, _):
            group, row, column = place(step)
            slot = lax.rem(step, config.num_stages)
            plgpu.barrier_wait(scratch.full.at[slot])
            even, odd = (plgpu.load(scratch.tiles.at[slot, i], layout=plgpu.Layout.WGMMA) for i in range(2))
            scale = scale_of(_largest(jnp.maximum(jnp.abs(even), jnp.abs(odd))), dtype)
            out["scale"][group, row, column] = scale
            plgpu.commit_smem()  # all threads have read the tile
            fetch_if_any(step + config.num_stages)
            # No value exceeds the largest of the dtype by more than what is rounded away: there is nothing to clip.
            even, odd = ((half.astype(jnp.float32) * (1 / scale)).astype(dtype) for half in (even, odd))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if n_last:
                scratch.n_last[0] = even
                scratch.n_last[1] = odd
            if k_major:
                _Transposed.of(scratch.k_major).pairs.T[...] = _side_by_side(even, odd)
            plgpu.commit_smem()
            if n_last:
                for i, half in enumerate(halves(out["n_last"], group, row, column)):
                    plgpu.copy_smem_to_gmem(scratch.n_last.at[i], half, commit_group=False)
            if k_major:
                values = _Transposed.of(scratch.k_major).values
                rows = pl.ds(pl.multiple_of((group * column_tiles + column) * SCALE_BLOCK, SCALE_BLOCK), SCALE_BLOCK)
                width = values.shape[1]
                place_in_row = pl.ds(pl.multiple_of(row * width, width), width)
                plgpu.copy_smem_to_gmem(values, out["k_major"].at[rows, place_in_row], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        lax.fori_loop(0, config.num_stages, fetch_if_any, None)
        lax.fori_loop(0, steps, one_tile, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    half_tile = (2, SCALE_BLOCK // 2, SCALE_BLOCK)
    results = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[
            _Scratch(
                tiles=swizzled((config.num_stages, *half_tile), weights.dtype, any_row=False),
                full=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
                n_last=swizzled(half_tile, dtype, any_row=False) if n_last else None,
                k_major=_Transposed.describe(dtype) if k_major else None,
            )
        ],
        kernel_name="quantize_transpose",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(weights.reshape(pairs))
    found = dict(zip(outs, results, strict=True))
    scale = found["scale"]
    transposed, straight = None, None
    if k_major:
        values = found["k_major"]
        if values.dtype != dtype:
            values = lax.bitcast_convert_type(values, dtype)
        transposed = QTensor(values.reshape(groups, columns, depth), scale.mT)
    if n_last:
        straight = QTensor(found["n_last"].reshape(weights.shape), scale)
    return transposed, straight


class _Transposed(NamedTuple):
    """The two views of the transposed result of a tile: as it is stored, and as it is copied.

    Interpret mode keeps apart the views of a buffer; with `single_view` all is in pairs, the kernel's result too.

    Attributes:
      pairs: uint16 [128, 64], two neighbours in a row as one number, the first in its lower half.
      values: 8 bits [128, 128].
    """

    pairs: Any
    values: Any

    @classmethod
    def describe(cls, dtype: jnp.dtype) -> Any:
        """The buffer to allocate."""
        pairs = swizzled((SCALE_BLOCK, SCALE_BLOCK // 2), jnp.uint16, any_row=False)
        return pairs if single_view.get() else plgpu.RefUnion(pairs, swizzled((SCALE_BLOCK,) * 2, dtype, any_row=False))

    @classmethod
    def of(cls, ref: Any) -> "_Transposed":
        """The views of a buffer that `describe` described."""
        return cls(ref, ref) if single_view.get() else cls(*ref)


def _transposed_type(rows: int, columns: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """The type of the transposed result, a matrix."""
    if single_view.get():
        return jax.ShapeDtypeStruct((rows, columns // 2), jnp.uint16)
    return jax.ShapeDtypeStruct((rows, columns), dtype)


def _largest(x: jax.Array) -> jax.Array:
    """The largest of numbers from 0 on, in float32, or a NaN if there is one."""
    # As integers, in the order of which NaN comes last: a float maximum over rows skips it in interpret mode.
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return lax.bitcast_convert_type(jnp.max(jnp.max(bits, axis=1)), jnp.float32)


def _side_by_side(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two 8-bit arrays as one of 16 bits."""
    low, high = (lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16) for x in (low, high))
    return low | (high << 8)


def _config(dtype: jnp.dtype) -> Config:
    """As many blocks as registers and shared memory have room for: a tile in each, and its result."""
    return Config(blocks_per_core=3 if dtype.itemsize == 2 else 2)


def _most_blocks(chip: Chip, config: Config) -> int:
    return chip.cores * config.blocks_per_core


def _check(weights: jax.Array, dtype: jnp.dtype) -> None:
    require_fp8("quantize_transpose", weights.dtype, dtype)
    if any(size % SCALE_BLOCK for size in weights.shape[1:]) or not weights.size:
        raise Unsupported(
            f"quantize_transpose: the kernel needs K and N to be multiples of {SCALE_BLOCK}, and all sizes to be "
            f"positive, got {list(weights.shape)}"
        )

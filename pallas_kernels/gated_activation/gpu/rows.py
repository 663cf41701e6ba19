"""Gated activations and their pullback on NVIDIA GPUs, with what a product in 8 bits takes of them, in one pass.

    floor in time = (bytes of the operands + bytes of the results) / HBM bandwidth

A block takes a tile of some rows and the columns that have one scale in a row, of gate, of up and, in the pullback, of
the cotangent; each row of it is held by neighbouring threads of a warp, which find its scale among them. The loads of
a block's next tile are on their way while it works. Tiles of all columns come before those of the next rows, so that
memory is read and written in order. The cotangents of gate and of up go where they belong in one array; those of the
rows' weights are summed up by tiles, and XLA adds up those of a row.

The last tile of a column begins early enough to end with the rows: what two tiles share is computed twice, with the
same result. Scales are written as products read them, [blocks, R], and transposed by name only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import Activation
from pallas_kernels.chips import Chip
from pallas_kernels.dtypes import is_float
from pallas_kernels.gated_activation import reference
from pallas_kernels.gated_activation.formulas import value_of, with_derivatives
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.rounding import FP8, rounded_in_blocks
from pallas_kernels.on_gpu.strips import for_each, in_blocks, rows_in_blocks, spread, store
from pallas_kernels.quantize import SCALE_BLOCK, QTensor


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      rows: of a tile.
      blocks_per_core: blocks that run on a core at once.
    """

    rows: int
    blocks_per_core: int


class _Tiles(NamedTuple):
    """The tiles of a matrix [R, I].

    Attributes:
      rows: of a tile.
      width: its columns.
      num_rows: R.
      columns: I.
    """

    rows: int
    width: int
    num_rows: int
    columns: int

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return self.columns // self.width

    @property
    def total(self) -> int:
        """All tiles."""
        return self.across * pl.cdiv(self.num_rows, self.rows)

    def place(self, tile) -> tuple[Any, Any]:
        """The first row of a tile, and its place among those side by side."""
        first = lax.div(tile, self.across) * self.rows
        return jnp.minimum(first, self.num_rows - self.rows), lax.rem(tile, self.across)

    def window(self, ref, row, block):
        """A tile of a matrix that has multiples of I columns."""
        first = pl.multiple_of(block * self.width, self.width)
        return ref.at[pl.ds(row, self.rows), pl.ds(first, self.width)]

    def load(self, ref, row, block) -> jax.Array:
        """A tile, in registers."""
        return plgpu.load(self.window(ref, row, block), layout=in_blocks(self.width), optimized=False)

    def load_vector(self, ref, row) -> jax.Array:
        """A number of each row of a tile."""
        layout = in_blocks(self.width).reduce((1,))
        return plgpu.load(ref.at[pl.ds(row, self.rows)], layout=layout, optimized=False)

    def of_rows(self, value: jax.Array) -> jax.Array:
        """A number of each row, as a tile."""
        return spread(value, self.width)


def gated_activation(
    h: jax.Array,
    row_weights: jax.Array | None,
    *,
    activation: Activation,
    limit: float | None,
    out_dtype: jnp.dtype | None,
    in_8_bits: jnp.dtype | None,
    with_8_bits: bool,
    config: Config | None = None,
) -> tuple[jax.Array | None, QTensor | None]:
    """See `pallas_kernels.gated_activation.reference.gated_activation`; `config` is for tuning.

    The logistic function is correct to some 1e-6 of it, as is therefore what is rounded.
    """
    chip = hopper_chip("gated_activation")
    config = config or _config(h.dtype, operands=2)
    num_rows, columns = h.shape[0], h.shape[1] // 2
    tiles = _cut(num_rows, columns, config, [h.dtype, out_dtype], [in_8_bits])
    if tiles is None:
        options: Any = {"activation": activation, "limit": limit, "out_dtype": out_dtype, "in_8_bits": in_8_bits}
        return reference.gated_activation(h, row_weights, **options, with_8_bits=with_8_bits)
    outs = _outs(tiles, columns, out_dtype, in_8_bits if with_8_bits else None)

    def finish(ref, row, block, weights, gate, up):
        value = value_of(gate.astype(jnp.float32), up.astype(jnp.float32), activation, limit)
        value, rounded = _weighed(tiles, value, weights, in_8_bits)
        if rounded is not None:
            _store_rounded(tiles, ref, row, block, *rounded)
        if "array" in ref:
            store(tiles.window(ref["array"], row, block), value.astype(out_dtype))

    found = _run("gated_activation", tiles, outs, _most_blocks(chip, config), finish, row_weights, h)
    return found.get("array"), _rounded_result(found)


def gated_activation_pullback(
    h: jax.Array,
    dout: jax.Array,
    row_weights: jax.Array | None,
    *,
    activation: Activation,
    limit: float | None,
    with_array: bool,
    in_8_bits: jnp.dtype | None,
    with_weights: bool,
    with_result: jnp.dtype | None,
    result_in_8_bits: jnp.dtype | None,
    config: Config | None = None,
) -> tuple[jax.Array | None, QTensor | None, jax.Array | None, jax.Array | None]:
    """See `pallas_kernels.gated_activation.reference.gated_activation_pullback`, and `gated_activation`.

    The result has the bits that `gated_activation` gives it here.
    """
    chip = hopper_chip("gated_activation_pullback")
    config = config or _config(h.dtype, operands=3, with_result=with_result is not None)
    num_rows, columns = dout.shape
    if with_result is None and not with_weights:
        result_in_8_bits = None
    tiles = _cut(num_rows, columns, config, [h.dtype, dout.dtype, with_result], [in_8_bits, result_in_8_bits])
    if tiles is None:
        options: Any = {"activation": activation, "limit": limit, "with_array": with_array, "in_8_bits": in_8_bits}
        options |= {"with_weights": with_weights, "with_result": with_result, "result_in_8_bits": result_in_8_bits}
        return reference.gated_activation_pullback(h, dout, row_weights, **options)
    outs = _outs(tiles, 2 * columns, h.dtype if with_array else None, in_8_bits)
    if with_weights:
        outs["shares"] = jax.ShapeDtypeStruct((tiles.across, num_rows), jnp.float32)
    if with_result is not None:
        outs["result"] = jax.ShapeDtypeStruct((num_rows, columns), with_result)

    def finish(ref, row, block, weights, gate, up, gradient):
        wide = gradient.astype(jnp.float32)
        found = with_derivatives(gate.astype(jnp.float32), up.astype(jnp.float32), activation, limit)
        if with_weights:
            said, _ = _weighed(tiles, found.value, None, result_in_8_bits)
            store(ref["shares"].at[block, pl.ds(row, tiles.rows)], jnp.sum(wide * said, axis=1))
        if with_result is not None:
            result, _ = _weighed(tiles, found.value, weights, result_in_8_bits)
            store(tiles.window(ref["result"], row, block), result.astype(with_result))
        if weights is not None:
            wide = wide * tiles.of_rows(weights)
        for half, slope in enumerate((found.by_gate, found.by_up)):
            place = block + half * tiles.across
            value = wide * slope
            if "array" in ref:
                store(tiles.window(ref["array"], row, place), value.astype(h.dtype))
            if in_8_bits is not None:
                _store_rounded(tiles, ref, row, place, *rounded_in_blocks(value, in_8_bits))

    results = _run("gated_activation_pullback", tiles, outs, _most_blocks(chip, config), finish, row_weights, h, dout)
    drow_weights = results["shares"].sum(0) if with_weights else None
    return results.get("array"), _rounded_result(results), drow_weights, results.get("result")


def _run(
    name: str,
    tiles: _Tiles,
    outs: dict[str, jax.ShapeDtypeStruct],
    most_blocks: int,
    finish: Callable[..., None],
    row_weights: jax.Array | None,
    h: jax.Array,
    *others: jax.Array,
) -> dict[str, jax.Array]:
    """Calls finish(results by name, row, block, weights or None, gate, up, *others), in registers, for every tile."""
    blocks = min(tiles.total, most_blocks)
    operands = [h, *others, *([] if row_weights is None else [row_weights])]

    def body(*refs):
        pre, *rest = refs[: len(operands)]
        ref = dict(zip(outs, refs[len(operands) :], strict=True))

        def load(tile):
            row, block = tiles.place(tile)
            weights = None if row_weights is None else tiles.load_vector(rest[-1], row)
            gate, up = (tiles.load(pre, row, block + half * tiles.across) for half in range(2))
            return [weights, gate, up, *(tiles.load(other, row, block) for other in rest[: len(others)])]

        for_each(
            lax.axis_index("block"),
            blocks,
            tiles.total,
            load,
            lambda tile, loaded: finish(ref, *tiles.place(tile), *loaded),
        )

    results = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, approx_math=True
        ),
    )(*operands)
    return dict(zip(outs, results, strict=True))


def _rounded_result(found: dict[str, jax.Array]) -> QTensor | None:
    return QTensor(found["values"], found["scale"].T) if "values" in found else None


def _outs(
    tiles: _Tiles, columns: int, dtype: jnp.dtype | None, in_8_bits: jnp.dtype | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The results that are asked for, of `columns` columns."""
    outs = {}
    if dtype is not None:
        outs["array"] = jax.ShapeDtypeStruct((tiles.num_rows, columns), dtype)
    if in_8_bits is not None:
        outs["values"] = jax.ShapeDtypeStruct((tiles.num_rows, columns), in_8_bits)
        outs["scale"] = jax.ShapeDtypeStruct((columns // SCALE_BLOCK, tiles.num_rows), jnp.float32)
    return outs


def _weighed(
    tiles: _Tiles, value: jax.Array, weights: jax.Array | None, in_8_bits: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """A tile times the weights of its rows; with `in_8_bits` what its 8 bits say, and the values and scales of these.

    It is rounded as without weights, which go into the scales.
    """
    if in_8_bits is None:
        return value if weights is None else value * tiles.of_rows(weights), None
    rounded, scale = rounded_in_blocks(value, in_8_bits)
    scale = scale if weights is None else scale * weights
    return rounded.astype(jnp.float32) * tiles.of_rows(scale), (rounded, scale)


def _store_rounded(tiles: _Tiles, ref: dict[str, Any], row, block, values, scale) -> None:
    if "values" in ref:
        store(ref["scale"].at[block, pl.ds(row, tiles.rows)], scale)
        store(tiles.window(ref["values"], row, block), values)


def _cut(
    num_rows: int, columns: int, config: Config, dtypes: list[jnp.dtype | None], in_8_bits: list[jnp.dtype | None]
) -> _Tiles | None:
    """The tiles; None for what is left to XLA: few rows, odd columns, and dtypes that nobody trains in."""
    width = SCALE_BLOCK if columns % SCALE_BLOCK == 0 else SCALE_BLOCK // 2
    rounded_to = [dtype for dtype in in_8_bits if dtype is not None]
    if columns % width or not columns or (rounded_to and width != SCALE_BLOCK):
        return None
    if any(dtype is not None and not is_float(dtype) for dtype in dtypes):
        return None
    if any(dtype.name not in FP8 for dtype in rounded_to):
        return None
    least = rows_in_blocks(width)
    if num_rows < least:
        return None
    rows = min(max(config.rows // least, 1), num_rows // least) * least
    return _Tiles(rows, width, num_rows, columns)


def _most_blocks(chip: Chip, config: Config) -> int:
    return chip.cores * config.blocks_per_core


def _config(dtype: jnp.dtype, operands: int, *, with_result: bool = False) -> Config:
    """As many rows as a thread can hold of this tile and the next one, beside what it works with.

    No more blocks than registers have room for at once, as one that waits for others would be late: a thread needs up
    to 128 of them for a pullback, and up to 168 with the result.
    """
    rows = 16 if dtype.itemsize == 2 else 8
    return Config(rows=rows, blocks_per_core=5 if operands == 2 else 3 if with_result else 4)

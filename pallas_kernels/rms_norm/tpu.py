"""Root-mean-square normalisation on TPUs, through fast memory.

    floor in time = (bytes of the operands and of the results) / HBM bandwidth

which is what the kernels move: a step takes a block of rows, whose copies in and out pass while its neighbours are
computed. A few rows at a time are gone over twice, some columns at once: first for their sums, then for the result.

In the pullback a core adds up its share of the weight's gradient in fast memory, and XLA adds up those of the cores:
the same inputs give the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.cost import Cost, rms_norm_cost, rms_norm_pullback_cost
from pallas_kernels.on_tpu.device import tpu_chip
from pallas_kernels.on_tpu.row_copies import LANES, SUBLANES
from pallas_kernels.quantize import QTensor, Scaling, clipped_to, scale_of
from pallas_kernels.rms_norm import reference
from pallas_kernels.stage import Stage
from pallas_kernels.tracing.varying import result_varying_as

rms_norm_tangent = reference.rms_norm_tangent
"""What forward mode takes is left to XLA."""

_TILE = 4 * SUBLANES  # rows in a tile of 8 bits, the narrowest result
_STRIP = 512
_STEP_BYTES = 4 << 20
_MOST_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_rows: rows in a step, a multiple of 32.
    """

    block_rows: int


def rms_norm(
    x: jax.Array,
    weight: jax.Array | None,
    residual: jax.Array | None,
    *,
    eps: float,
    out_dtype: jnp.dtype,
    scaling: Scaling | None,
    with_sum: bool,
    config: Config | None = None,
    stage: Stage = "full",
) -> tuple[jax.Array | QTensor, jax.Array | None]:
    """See `pallas_kernels.rms_norm.reference.rms_norm`.

    Args:
      x: [T, H], BF16 or float32.
      weight: [H] or None.
      residual: [T, H] or None, BF16 or float32.
      eps: as there.
      out_dtype: BF16 or float32, or of 8 bits.
      scaling: "1x128", "per_row" or None.
      with_sum: as there.
      config: for tuning.
      stage: "comp" copies one block alone, "dma" computes nothing; their results mean nothing.

    Raises:
      Unsupported: another dtype or scaling.
    """
    _require_dtypes(x.dtype, None if residual is None else residual.dtype, None if scaling else out_dtype)
    if scaling not in (None, "1x128", "per_row"):
        raise Unsupported(f"rms_norm: the kernel scales by '1x128' or 'per_row', got {scaling!r}")
    num_rows, columns = x.shape
    if num_rows == 0:
        options: Any = {"eps": eps, "out_dtype": out_dtype, "scaling": scaling, "with_sum": with_sum}
        return reference.rms_norm(x, weight, residual, **options)
    outs = {"y": (columns, out_dtype)}
    if residual is not None:
        outs["total"] = columns, x.dtype
    if scaling is not None:
        outs["scale"] = (columns // LANES if scaling == "1x128" else 1), jnp.dtype(jnp.float32)
    cost = rms_norm_cost(
        num_rows,
        columns,
        dtype=x.dtype,
        out_dtype=out_dtype,
        has_residual=residual is not None,
        scales=outs["scale"][0] if scaling else 0,
    )
    found = _call(
        functools.partial(_normalize, eps=eps),
        {"x": x, "residual": residual},
        weight,
        outs,
        config,
        stage,
        cost,
        "rms_norm",
    )
    y = found["y"] if scaling is None else QTensor(found["y"], found["scale"])
    return y, found.get("total", x) if with_sum else None


def _normalize(refs: dict[str, Any], *, eps: float) -> None:
    """The rows of a block, a tile at a time."""
    x, y = refs["x"], refs["y"]

    @pl.loop(0, x.shape[0], step=_TILE)
    def _(first):
        tile = pl.ds(pl.multiple_of(first, _TILE), _TILE)
        squares = jnp.zeros((_TILE, 1), jnp.float32)
        for strip in _strips(x.shape[1]):
            total = x[tile, strip]
            if "residual" in refs:
                wide = total.astype(jnp.float32) + refs["residual"][tile, strip].astype(jnp.float32)
                total = wide.astype(x.dtype)
                refs["total"][tile, strip] = total
            wide = total.astype(jnp.float32)
            squares += jnp.sum(wide * wide, axis=1, keepdims=True)
        r = lax.rsqrt(squares / x.shape[1] + eps)

        def normalized(strip) -> jax.Array:
            return _weighted(refs, strip, refs.get("total", x)[tile, strip].astype(jnp.float32) * r)

        if "scale" not in refs:
            for strip in _strips(x.shape[1]):
                y[tile, strip] = normalized(strip).astype(y.dtype)
        elif refs["scale"].shape[1] == 1:
            amax = [_amax(normalized(strip)) for strip in _strips(x.shape[1])]
            scale = _scale(functools.reduce(jnp.maximum, amax), y.dtype)
            refs["scale"][tile, :] = scale
            for strip in _strips(x.shape[1]):
                y[tile, strip] = clipped_to(normalized(strip) * (1 / scale), y.dtype)
        else:
            for i in range(refs["scale"].shape[1]):
                strip = pl.ds(LANES * i, LANES)
                scale = _scale(_amax(normalized(strip)), y.dtype)
                refs["scale"][tile, pl.ds(i, 1)] = scale
                y[tile, strip] = clipped_to(normalized(strip) * (1 / scale), y.dtype)


def _amax(y: jax.Array) -> jax.Array:
    """The largest magnitude of each row, as bits: they are in its order, with infinity and NaN on top."""
    return jnp.max(lax.bitcast_convert_type(jnp.abs(y), jnp.int32), axis=1, keepdims=True)


def _scale(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return scale_of(lax.bitcast_convert_type(bits, jnp.float32), dtype)


def rms_norm_pullback(
    x: jax.Array,
    weight: jax.Array | None,
    dy: jax.Array,
    dsum: jax.Array | None,
    *,
    eps: float,
    weight_dtype: jnp.dtype | None,
    config: Config | None = None,
    stage: Stage = "full",
) -> tuple[jax.Array, jax.Array | None]:
    """See `pallas_kernels.rms_norm.reference.rms_norm_pullback`; what it refuses, and the rest, as `rms_norm`."""
    _require_dtypes(x.dtype, dy.dtype, None if dsum is None else dsum.dtype)
    num_rows, columns = x.shape
    if num_rows == 0:
        return reference.rms_norm_pullback(x, weight, dy, dsum, eps=eps, weight_dtype=weight_dtype)
    cost = rms_norm_pullback_cost(num_rows, columns, dtype=x.dtype, out_dtype=dy.dtype, has_residual=dsum is not None)
    kernel = functools.partial(_pull, eps=eps, num_rows=num_rows)
    inputs, outs = {"x": x, "dy": dy, "dsum": dsum}, {"dx": (columns, x.dtype)}
    if weight_dtype is not None:
        outs["share"] = columns, jnp.dtype(jnp.float32)
    found = _call(kernel, inputs, weight, outs, config, stage, cost, "rms_norm_pullback")
    return found["dx"], None if weight_dtype is None else found["share"].sum(0).astype(weight_dtype)


def _pull(refs: dict[str, Any], *, eps: float, num_rows: int) -> None:
    """The cotangents of a block's rows, a tile at a time, and what they add to the core's share."""
    x, dy = refs["x"], refs["dy"]
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

    if "share" in refs:

        @pl.when(pl.program_id(1) == 0)
        def clear():
            refs["share"][...] = jnp.zeros(refs["share"].shape, jnp.float32)

    @pl.loop(0, x.shape[0], step=_TILE)
    def _(first):
        tile = pl.ds(pl.multiple_of(first, _TILE), _TILE)
        squares = product = jnp.zeros((_TILE, 1), jnp.float32)
        for strip in _strips(x.shape[1]):
            wide, gradient = x[tile, strip].astype(jnp.float32), dy[tile, strip].astype(jnp.float32)
            squares += jnp.sum(wide * wide, axis=1, keepdims=True)
            product += jnp.sum(wide * _weighted(refs, strip, gradient), axis=1, keepdims=True)
        r = lax.rsqrt(squares / x.shape[1] + eps)
        mean = jnp.where(r == 0, 0, r * product / x.shape[1])  # of a row whose squares overflow
        row = block * x.shape[0] + first + lax.broadcasted_iota(jnp.int32, (_TILE, 1), 0)
        for strip in _strips(x.shape[1]):
            n, gradient = x[tile, strip].astype(jnp.float32) * r, dy[tile, strip].astype(jnp.float32)
            dx = r * (_weighted(refs, strip, gradient) - n * mean)
            if "dsum" in refs:
                dx += refs["dsum"][tile, strip].astype(jnp.float32)
            refs["dx"][tile, strip] = dx.astype(x.dtype)
            if "share" in refs:
                share = jnp.where(row < num_rows, gradient * n, 0)  # of rows past the last one, anything
                refs["share"][:, strip] += share.reshape(-1, SUBLANES, share.shape[1]).sum(0)


def _weighted(refs: dict[str, Any], strip, y: jax.Array) -> jax.Array:
    return y * refs["weight"][:, strip] if "weight" in refs else y


def _strips(columns: int) -> Iterator[Any]:
    """Slices of columns, so narrow that what is computed of a tile stays in registers."""
    return (pl.ds(c, min(_STRIP, columns - c)) for c in range(0, columns, _STRIP))


def _require_dtypes(*dtypes: jnp.dtype | None) -> None:
    for dtype in dtypes:
        if dtype not in (None, jnp.bfloat16, jnp.float32):
            raise Unsupported(f"rms_norm: TPUs compute in BF16 and float32, got {dtype}")


def _call(
    kernel: Callable[[dict[str, Any]], None],
    inputs: dict[str, jax.Array | None],
    weight: jax.Array | None,
    outs: dict[str, tuple[int, jnp.dtype]],
    config: Config | None,
    stage: Stage,
    cost: Cost,
    name: str,
) -> dict[str, jax.Array]:
    """Runs `kernel` over blocks of rows.

    Args:
      kernel: gets references by name.
      inputs: [T, H] each, or None.
      weight: [H] or None.
      outs: columns and dtype of each result: of T rows, but of 8 rows for each core if it is called "share".
      config: for tuning.
      stage: of the kernel.
      cost: of the kernel.
      name: of the kernel.
    """
    there = {key: array for key, array in inputs.items() if array is not None}
    x = there["x"]
    num_rows, cores = x.shape[0], tpu_chip().cores
    row_bytes = sum(array.shape[1] * array.dtype.itemsize for array in there.values())
    row_bytes += sum(columns * dtype.itemsize for columns, dtype in outs.values())
    block = (config or _config(num_rows, row_bytes, cores)).block_rows
    blocks = pl.cdiv(num_rows, block)
    each = pl.cdiv(blocks, cores)
    cores = pl.cdiv(blocks, each)

    def rows(columns: int) -> pl.BlockSpec:
        # Past the last block of rows comes the last one again, of which nothing is counted twice.
        last = 0 if stage == "comp" else blocks - 1
        return pl.BlockSpec((block, columns), lambda core, step: (jnp.minimum(core * each + step, last), 0))

    in_specs = [rows(array.shape[1]) for array in there.values()]
    if weight is not None:
        there["weight"] = weight.astype(jnp.float32)[None]
        in_specs.append(pl.BlockSpec((1, x.shape[1]), lambda core, step: (0, 0)))
    out_specs, out_shape = [], []
    for key, (columns, dtype) in outs.items():
        is_share = key == "share"
        out_specs.append(pl.BlockSpec((SUBLANES, columns), lambda core, step: (core, 0)) if is_share else rows(columns))
        out_shape.append(result_varying_as(x, (SUBLANES * cores if is_share else num_rows, columns), dtype))

    def body(*refs) -> None:
        if stage != "dma":
            kernel(dict(zip([*there, *outs], refs, strict=True)))

    results = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=(cores, each),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=int(2.5 * block * row_bytes) + 64 * x.shape[1] + (4 << 20),
        ),
        cost_estimate=pl.CostEstimate(flops=cost.flops, transcendentals=num_rows, bytes_accessed=cost.hbm_bytes),
        name=name,
    )(*there.values())
    return dict(zip(outs, results, strict=True))


def _config(num_rows: int, row_bytes: int, cores: int) -> Config:
    """Blocks that keep the copy engine busy, and some of them for each core, so that it copies while it computes."""
    most = min(_STEP_BYTES // row_bytes, _MOST_ROWS, pl.cdiv(num_rows, 4 * cores))
    return Config(block_rows=_TILE * max(1, most // _TILE))

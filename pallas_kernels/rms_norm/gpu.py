"""Root-mean-square normalisation on NVIDIA GPUs, through registers.

A block takes a row at a time, which its threads hold whole: they load it, sum its squares, and store it normalised.
The loads of a block's next row are on their way while it works. Rows too long for that are left to XLA.

    floor in time = (bytes of the operands and of the results) / HBM bandwidth

which is what the kernels move. A kernel that starts before the one before it has ended (`on_gpu.prefetch`) can load its
weight until then, into registers, where a block has one row. In the pullback a block adds up its share of the weight's
gradient in registers, row by row, and XLA adds up those of the blocks, so that the same inputs give the same bits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.on_gpu.prefetch import PLAIN, Prefetch, with_prefetch
from pallas_kernels.on_gpu.strips import Blocks, Strips, cut, cut_in_blocks, for_each, launch
from pallas_kernels.quantize import QTensor, Scaling, clipped_to, scale_of
from pallas_kernels.rms_norm import reference

rms_norm_tangent = reference.rms_norm_tangent
"""What forward mode takes is left to XLA."""

_MOST_HELD = 32 << 10
"""Bytes of a row that a warpgroup holds, and of the next one's operands, a quarter of its registers each."""

_MOST_COLUMNS_BACK = 8192
"""Of a row that a warpgroup holds with its cotangent and a share of the weight's gradient."""

_HELD_BY_A_CORE = 100 << 10
"""Bytes that all warpgroups of a core hold in such ways at once; the rest of the registers are worked with."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      blocks: most blocks.
      prefetch: when the kernel starts, and whether it loads the weight before the one ahead of it has ended: in mode
        "smem", where each block has one row. Not of the pullback.
    """

    blocks: int
    prefetch: Prefetch = PLAIN


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
) -> tuple[jax.Array | QTensor, jax.Array | None]:
    """See `pallas_kernels.rms_norm.reference.rms_norm`; `config` is for tuning.

    Raises:
      Unsupported: rows are too short, or are to be scaled in other ways than "1x128" and "per_row".
    """
    chip = hopper_chip("rms_norm")
    strips = _cut(x, scaling)
    num_rows, columns = x.shape
    if num_rows == 0 or columns * x.dtype.itemsize > _MOST_HELD:
        options: Any = {"eps": eps, "out_dtype": out_dtype, "scaling": scaling, "with_sum": with_sum}
        return reference.rms_norm(x, weight, residual, **options)
    inputs = _viewed(strips, x=x, residual=residual, weight=weight)
    row_shape = (num_rows, strips.vectors, strips.vector)
    outs = {"y": jax.ShapeDtypeStruct(row_shape, out_dtype)}
    if residual is not None:
        outs["total"] = jax.ShapeDtypeStruct(row_shape, x.dtype)
    if scaling is not None:
        outs["scale"] = jax.ShapeDtypeStruct(
            (num_rows, strips.vectors if isinstance(strips, Blocks) else 1), jnp.float32
        )
    summed = [name for name in ("x", "residual") if name in inputs]
    held_bytes, next_bytes = x.dtype.itemsize, sum(inputs[name].dtype.itemsize for name in summed)  # of an element
    loads_ahead = columns * next_bytes <= _MOST_HELD
    if scaling == "per_row":
        held_bytes += 4  # the result in float32, until its scale is known
    config = with_prefetch(config or _config(chip, columns * (held_bytes + (next_bytes if loads_ahead else 0))))
    blocks, prefetch = min(num_rows, config.blocks), config.prefetch
    early = prefetch.mode == "smem" and weight is not None and blocks == num_rows
    strips_early, launch_row = prefetch.ahead(strips.count) if early else 0, _launch_row(prefetch, num_rows, blocks)

    def body(*refs):
        ref = dict(zip([*inputs, *outs], refs, strict=True))
        weights = [strips.load(ref["weight"], 0, i) for i in range(strips_early)]
        prefetch.wait()

        def load(row):
            return [[strips.load(ref[name], row, i) for name in summed] for i in range(strips.count)]

        def weight_of(i):
            return weights[i] if i < len(weights) else strips.load(ref["weight"], 0, i)

        def normalize(row, parts):
            if launch_row is not None:
                pl.when(row >= launch_row)(prefetch.launch_dependents)
            held = []
            squares = strips.zeros(jnp.float32)
            for i, terms in enumerate(parts if loads_ahead else load(row)):
                total = terms[0]
                if residual is not None:
                    total = (terms[0].astype(jnp.float32) + terms[1].astype(jnp.float32)).astype(x.dtype)
                    strips.store(ref["total"], row, i, total)
                wide = total.astype(jnp.float32)
                squares += strips.once(i, wide * wide)
                held.append(total)
            r = lax.rsqrt(strips.sum(squares) / columns + eps)

            def normalized(i):
                wide = held[i].astype(jnp.float32) * r
                return wide if weight is None else wide * weight_of(i).astype(jnp.float32)

            _finish(strips, ref, row, normalized)

        for_each(lax.axis_index("block"), blocks, num_rows, load if loads_ahead else lambda row: None, normalize)

    results = dict(
        zip(outs, launch(body, list(outs.values()), *inputs.values(), name="rms_norm", blocks=blocks), strict=True)
    )
    y = results["y"].reshape(x.shape)
    total = results.get("total", x)
    return y if scaling is None else QTensor(y, results["scale"]), total.reshape(x.shape) if with_sum else None


def _launch_row(prefetch: Prefetch, num_rows: int, blocks: int) -> int | None:
    """The row from which on a block allows the next kernel, None if it never does: at the latest its own last one."""
    begun = prefetch.begun(num_rows)
    return None if begun is None else min(begun, num_rows - blocks)


def _config(chip: Chip, held_bytes: int) -> Config:
    """As many blocks as run at once, of which each keeps `held_bytes` in registers beside what it works with."""
    return Config(blocks=chip.cores * max(2, min(8, _HELD_BY_A_CORE // held_bytes)))


def _cut(x: jax.Array, scaling: Scaling | None) -> Strips:
    if scaling == "1x128":
        return cut_in_blocks("rms_norm", x.shape[1])
    if scaling not in (None, "per_row"):
        raise Unsupported(f"rms_norm: the kernel scales by '1x128' or 'per_row', got {scaling!r}")
    return cut("rms_norm", x.shape[1], x.dtype, 1)


def _viewed(strips: Strips, **arrays: jax.Array | None) -> dict[str, jax.Array]:
    """Those that there are, as `strips` look at them; a vector is one row."""
    there = {name: array for name, array in arrays.items() if array is not None}
    return {name: strips.view(array if array.ndim == 2 else array[None]) for name, array in there.items()}


def _finish(strips: Strips, ref, row, normalized) -> None:
    """Stores the strips normalized(i) of a row, rounded as `quantize` does where the result has scales."""
    if "scale" not in ref:
        for i in range(strips.count):
            strips.store(ref["y"], row, i, normalized(i).astype(ref["y"].dtype))
        return
    dtype = ref["y"].dtype
    if isinstance(strips, Blocks):
        for i in range(strips.count):
            y = normalized(i)
            scale = scale_of(jnp.max(jnp.abs(y), axis=1), dtype)
            strips.store(ref["scale"], row, i, scale)
            strips.store(ref["y"], row, i, clipped_to(y * strips.of_blocks(1 / scale), dtype))
        return
    amax = jnp.abs(normalized(0))
    for i in range(1, strips.count):
        amax = jnp.maximum(amax, jnp.abs(normalized(i)))
    scale = scale_of(jnp.max(amax), dtype)
    ref["scale"][row, 0] = scale
    for i in range(strips.count):
        strips.store(ref["y"], row, i, clipped_to(normalized(i) * (1 / scale), dtype))


def rms_norm_pullback(
    x: jax.Array,
    weight: jax.Array | None,
    dy: jax.Array,
    dsum: jax.Array | None,
    *,
    eps: float,
    weight_dtype: jnp.dtype | None,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """See `pallas_kernels.rms_norm.reference.rms_norm_pullback`; `config` and what it refuses as `rms_norm`."""
    chip = hopper_chip("rms_norm_pullback")
    num_rows, columns = x.shape
    strips = cut("rms_norm_pullback", columns, x.dtype, 1)
    held_bytes = columns * (x.dtype.itemsize + dy.dtype.itemsize + (0 if weight_dtype is None else 4))
    if num_rows == 0 or columns > _MOST_COLUMNS_BACK:
        return reference.rms_norm_pullback(x, weight, dy, dsum, eps=eps, weight_dtype=weight_dtype)
    blocks = min(num_rows, (config or _config(chip, held_bytes)).blocks)
    inputs = _viewed(strips, x=x, dy=dy, dsum=dsum, weight=weight)
    outs = {"dx": jax.ShapeDtypeStruct((num_rows, strips.vectors, strips.vector), x.dtype)}
    if weight_dtype is not None:
        outs["shares"] = jax.ShapeDtypeStruct((blocks, strips.vectors, strips.vector), jnp.float32)

    def body(*refs):
        ref = dict(zip([*inputs, *outs], refs, strict=True))
        block = lax.axis_index("block")

        def weighted(i, strip):
            return strip if weight is None else strip * strips.load(ref["weight"], 0, i).astype(jnp.float32)

        def pull(turn, shares):
            row = block + turn * blocks
            held = [(strips.load(ref["x"], row, i), strips.load(ref["dy"], row, i)) for i in range(strips.count)]
            squares, product = strips.zeros(jnp.float32), strips.zeros(jnp.float32)
            for i, pair in enumerate(held):
                wide, gradient = (strip.astype(jnp.float32) for strip in pair)
                squares += strips.once(i, wide * wide)
                product += strips.once(i, wide * weighted(i, gradient))
            r = lax.rsqrt(strips.sum(squares) / columns + eps)
            mean = jnp.where(r == 0, 0, r * strips.sum(product) / columns)  # of a row whose squares overflow
            found = []
            for i, pair in enumerate(held):
                n, gradient = pair[0].astype(jnp.float32) * r, pair[1].astype(jnp.float32)
                dx = r * (weighted(i, gradient) - n * mean)
                if dsum is not None:
                    dx += strips.load(ref["dsum"], row, i).astype(jnp.float32)
                strips.store(ref["dx"], row, i, dx.astype(x.dtype))
                found.append(gradient * n)
            return [share + more for share, more in zip(shares, found, strict=True)] if shares else shares

        nothing = [strips.zeros(jnp.float32) for _ in range(strips.count)] if "shares" in ref else []
        turns = lax.div(num_rows - 1 - block, jnp.int32(blocks)) + 1
        for i, share in enumerate(lax.fori_loop(0, turns, pull, nothing)):
            strips.store(ref["shares"], block, i, share)

    dx, *shares = launch(body, list(outs.values()), *inputs.values(), name="rms_norm_pullback", blocks=blocks)
    dweight = shares[0].reshape(blocks, columns).sum(0).astype(weight_dtype) if shares else None
    return dx.reshape(x.shape), dweight

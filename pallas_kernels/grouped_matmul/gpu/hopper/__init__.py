"""Grouped matrix products on NVIDIA Hopper GPUs, in Pallas (Mosaic GPU): see `hopper.kernel`.

    operands            rhs layout               scales
    BF16·BF16, FP16     [G, K, N] or [G, N, K]   -
    FP8·FP8             [G, N, K] (K-major)      lhs per tensor, row, or 1x128; rhs per tensor, channel, or 128x128

e4m3 and e5m2 mix. Where only one operand is in 8 bits, as in gradients, it is dequantised to BF16 first, which reads
and writes it once more; if the other one is float32, that is rounded to BF16. Float32 alone is left to XLA.

The tensor cores add FP8 products with about 13 bits. Scales that come in blocks of 128 also bound how much is added
that way: their parts are added in float32. So are those of `grouped_matmul_of_columns`, gradients of weights in 8 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Unsupported
from pallas_kernels.columns import BLOCK, Columns, first_blocks
from pallas_kernels.dtypes import FLOATS, is_float
from pallas_kernels.grouped_matmul.gpu.hopper import drhs, drhs_8_bits, tiling
from pallas_kernels.grouped_matmul.gpu.hopper.kernel import grouped_product
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Epilogue, Inputs, Problem
from pallas_kernels.grouped_matmul.group_sizes import bounds
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.quantize import SCALE_BLOCK, Operand, QTensor, dequantize, quantize
from pallas_kernels.stage import Stage

_FP8 = ("float8_e4m3fn", "float8_e5m2")


def grouped_matmul(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None,
    group_offset: jax.Array | int,
    transpose_rhs: bool,
    out_dtype: jax.typing.DTypeLike,
    stage: Stage = "full",
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul.grouped_matmul`."""
    epilogue = Epilogue(jnp.dtype(out_dtype))
    return _product(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs, epilogue, stage)


def grouped_gate_up(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None,
    activation: Activation,
    activation_limit: float | None,
    group_offset: jax.Array | int,
    transpose_rhs: bool,
    out_dtype: jax.typing.DTypeLike,
    stage: Stage = "full",
) -> jax.Array | QTensor:
    """See `pallas_kernels.grouped_matmul.grouped_gate_up`; an 8-bit `out_dtype` gives a QTensor with 1x128 scales."""
    dtype = jnp.dtype(out_dtype)
    columns = rhs.shape[1 if transpose_rhs else 2] // 2
    in_float32 = dtype.itemsize == 1 and (dtype.name not in _FP8 or columns % SCALE_BLOCK)
    epilogue = Epilogue(
        jnp.dtype(jnp.float32) if in_float32 else dtype, activation=activation, activation_limit=activation_limit
    )
    out = _product(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs, epilogue, stage)
    return quantize(out, dtype, scaling="1x128") if in_float32 else out


def grouped_matmul_drhs(
    lhs: Operand,
    dout: Operand,
    group_sizes: jax.Array,
    *,
    num_groups: int,
    group_offset: jax.Array | int,
    onto: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul.reference.grouped_matmul_drhs`.

    Operands in 8 bits are dequantised to BF16 first: the sum runs over rows, of which FP8 would need a transposed copy.
    """
    chip = hopper_chip("grouped_matmul")
    left, right = (_in_16_bits(x) for x in same_precision(lhs, dout))
    (num_rows, depth), columns, out_dtype = left.shape, right.shape[1], jnp.dtype(out_dtype)
    if not is_float(out_dtype):
        raise Unsupported(f"Hopper kernels write {', '.join(FLOATS)}, got {out_dtype.name}")
    require_multiple("K", depth, 8)
    require_multiple("N", columns, 64)
    if num_rows == 0:
        return jnp.zeros((num_groups, depth, columns), out_dtype) if onto is None else onto
    begins, ends = (
        jax.lax.dynamic_slice_in_dim(rows, group_offset, num_groups) for rows in bounds(group_sizes, num_rows)
    )
    padding = ((0, -num_rows % drhs.ROW_ALIGNMENT), (0, 0))
    return drhs.grouped_drhs(
        jnp.pad(left, padding),
        jnp.pad(right, padding),
        begins,
        ends,
        onto,
        out_dtype,
        drhs.pick(out_dtype, adds=onto is not None),
        num_blocks=chip.cores,
    )


def grouped_matmul_of_columns(
    lhs: Columns,
    dout: Columns,
    group_sizes: jax.Array,
    *,
    onto: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
    config: drhs_8_bits.Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul.grouped_matmul_of_columns`; `config` is for tuning."""
    chip = hopper_chip("grouped_matmul")
    (depth, num_rows), columns, out_dtype = lhs.values.shape, dout.values.shape[0], jnp.dtype(out_dtype)
    names = lhs.dtype.name, dout.dtype.name
    if any(name not in _FP8 for name in names):
        raise Unsupported(
            f"Hopper kernels multiply columns in {' or '.join(_FP8)}, got lhs {names[0]}, dout {names[1]}"
        )
    if not is_float(out_dtype):
        raise Unsupported(f"Hopper kernels write {', '.join(FLOATS)}, got {out_dtype.name}")
    require_multiple("K", depth, 8)
    require_multiple("N", columns, 8)
    blocks = first_blocks(jnp.clip(group_sizes, 0, num_rows))
    return drhs_8_bits.grouped_drhs(
        lhs,
        dout,
        jnp.minimum(blocks, num_rows // BLOCK),
        onto,
        out_dtype,
        config or drhs_8_bits.pick(out_dtype, num_rows // group_sizes.shape[0], adds=onto is not None),
        num_blocks=chip.cores,
    )


def _product(lhs, rhs, group_sizes, bias, group_offset, k_major: bool, epilogue: Epilogue, stage: Stage) -> Any:
    chip = hopper_chip("grouped_matmul")
    lhs, rhs = same_precision(lhs, rhs)
    _check(lhs, rhs, bias, k_major, epilogue)
    columns = rhs.shape[1 if k_major else 2]
    if lhs.shape[0] == 0:
        out = jnp.zeros((0, columns // 2 if epilogue.activation else columns), epilogue.out_dtype)
        return QTensor(out, jnp.zeros((0, out.shape[1] // SCALE_BLOCK))) if epilogue.requantizes else out
    lhs_values, lhs_scale, lhs_kind = _lhs_scale(lhs)
    rhs_values, rhs_scale, rhs_kind = _rhs_scale(rhs)
    if epilogue.activation and rhs_kind == "block":
        require_multiple("I of an rhs with block scales", columns // 2, SCALE_BLOCK)
    problem = Problem(
        operand=lhs.dtype.name,
        block_scales="block" in (lhs_kind, rhs_kind),
        fused=epilogue.activation is not None,
        result_in_8_bits=epilogue.requantizes,
        num_groups=rhs.shape[0],
        num_rows=lhs.shape[0],
        depth=lhs.shape[1],
        columns=columns,
    )
    out = grouped_product(
        Inputs(
            group_sizes,
            jnp.reshape(jnp.asarray(group_offset, jnp.int32), (1,)),
            lhs_values,
            rhs_values,
            lhs_scale,
            rhs_scale,
            bias,
        ),
        Epilogue(epilogue.out_dtype, lhs_kind, rhs_kind, epilogue.activation, epilogue.activation_limit),
        tiling.pick(chip, problem),
        k_major=k_major,
        num_blocks=chip.cores,
        stage=stage,
    )
    if not epilogue.requantizes:
        return out
    values, scales = out
    return QTensor(values, scales[:, : lhs.shape[0]].T)


def same_precision(lhs: Operand, rhs: Operand) -> tuple[Operand, Operand]:
    """The operands as the tensor cores take them together: both in 8 bits, or both arrays of one dtype.

    Raises:
      Unsupported: a dtype that the kernels do not multiply.
    """
    quantized = [isinstance(operand, QTensor) for operand in (lhs, rhs)]
    if any(quantized) and not all(quantized):
        array = rhs if quantized[0] else lhs
        dtype = array.dtype if array.dtype.itemsize == 2 else jnp.dtype(jnp.bfloat16)
        lhs, rhs = (dequantize(x, dtype) if isinstance(x, QTensor) else x.astype(dtype) for x in (lhs, rhs))
    names = lhs.dtype.name, rhs.dtype.name
    if not (names in (("bfloat16",) * 2, ("float16",) * 2) or all(name in _FP8 for name in names)):
        raise Unsupported(
            f"Hopper kernels multiply bfloat16 by bfloat16, float16 by float16, or FP8 ({', '.join(_FP8)}) by FP8, "
            f"got lhs {names[0]} and rhs {names[1]}"
        )
    return lhs, rhs


def _in_16_bits(operand: Operand) -> jax.Array:
    return dequantize(operand, jnp.bfloat16) if isinstance(operand, QTensor) else operand


def _check(lhs: Operand, rhs: Operand, bias: jax.Array | None, k_major: bool, epilogue: Epilogue) -> None:
    depth, columns = lhs.shape[1], rhs.shape[1 if k_major else 2]
    out_columns = columns // 2 if epilogue.activation else columns
    if not is_float(epilogue.out_dtype) and not epilogue.requantizes:
        raise Unsupported(f"Hopper kernels write {', '.join(FLOATS)}, got {epilogue.out_dtype.name}")
    if lhs.dtype.itemsize == 1 and not k_major:
        raise Unsupported(
            f"Hopper multiplies FP8 only with K as the minor dimension: rhs must be [G, N, K] with transpose_rhs=True, "
            f"got [G, K, N] = {list(rhs.shape)}; store the weights K-major"
        )
    require_multiple("K", depth, 16 // lhs.dtype.itemsize)
    require_multiple("N" if not epilogue.activation else "I", out_columns, 8)
    if not k_major:
        require_multiple("N of rhs [G, K, N]" if not epilogue.activation else "I of rhs [G, H, 2I]", out_columns, 64)
        require_multiple("K of rhs [G, K, N]", depth, 8)
    if bias is not None and not is_float(bias.dtype):
        raise Unsupported(f"bias must be one of {', '.join(FLOATS)}, got {bias.dtype.name}")


def require_multiple(name: str, size: int, multiple: int) -> None:
    """Raises Unsupported unless `size` is a positive multiple that the copy engine can address."""
    if size % multiple or not size:
        raise Unsupported(f"Hopper's copy engine needs {name} to be a positive multiple of {multiple}, got {size}")


def _lhs_scale(lhs: Operand):
    """(values, scale, kind) of lhs [M, K]."""
    if not isinstance(lhs, QTensor):
        return lhs, None, None
    (num_rows, depth), (rows, depths) = lhs.shape, lhs.scale.shape
    if (rows, depths) == (1, 1):
        return lhs.values, lhs.scale.reshape(1), "tensor"
    padding = -num_rows % 4
    if (rows, depths) == (num_rows, 1):
        return lhs.values, jnp.pad(lhs.scale[:, 0], (0, padding)), "row"
    if rows == num_rows and depths * SCALE_BLOCK == depth:
        return lhs.values, jnp.pad(lhs.scale.T, ((0, 0), (0, padding))), "block"
    raise Unsupported(
        "Hopper kernels take lhs scales per tensor [1, 1], per row [M, 1] or per 1x128 block [M, K/128], got scale "
        f"{list(lhs.scale.shape)} of values {list(lhs.shape)}"
    )


def _rhs_scale(rhs: Operand):
    """(values, scale, kind) of rhs [G, N, K]."""
    if not isinstance(rhs, QTensor):
        return rhs, None, None
    (num_groups, columns, depth), (groups, *blocks) = rhs.shape, rhs.scale.shape
    if groups in (1, num_groups):
        if blocks == [1, 1]:
            return rhs.values, rhs.scale.reshape(groups), "tensor"
        if blocks == [columns, 1]:
            return rhs.values, rhs.scale.reshape(groups, columns), "channel"
        if [block * SCALE_BLOCK for block in blocks] == [columns, depth]:
            return rhs.values, rhs.scale, "block"
    raise Unsupported(
        "Hopper kernels take rhs scales per group [G, 1, 1], per channel [G, N, 1] or per 128x128 block "
        f"[G, N/128, K/128], got scale {list(rhs.scale.shape)} of values {list(rhs.shape)}"
    )

"""Grouped matrix products on TPUs, in Pallas (Mosaic).

`kernel` has the product, `drhs` the gradient of the weights, `of_columns` the same in 8 bits.

    operands                        scales
    BF16, float32, and mixes        -
    8 bits · 8 bits, or beside      lhs per tensor, row, 1x128 or 128x128; rhs per tensor, channel, or in blocks like
    BF16 or float32                 128x128, of a depth that is a multiple of 128

Two 8-bit operands of one dtype are multiplied as they are where the chip does so natively (INT8 on v5e, v5p and v6e,
e4m3fn on v7x, e5m2 on all), and converted to BF16 in VMEM, which is exact, elsewhere: they save bytes only. Beside
float32 the other operand is converted to float32, and multiplied in full precision.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.activations import Activation, gated_halves
from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.columns import Columns
from pallas_kernels.cost import grouped_gate_up_cost, grouped_matmul_cost
from pallas_kernels.grouped_matmul.tpu import drhs, of_columns, tiling
from pallas_kernels.grouped_matmul.tpu.kernel import grouped_product
from pallas_kernels.grouped_matmul.tpu.math import Arithmetic
from pallas_kernels.grouped_matmul.tpu.memory import Inputs
from pallas_kernels.grouped_matmul.tpu.scales import lhs_scales, rhs_scales
from pallas_kernels.on_tpu.device import cores_of_a_device, tpu_chip
from pallas_kernels.quantize import Operand, QTensor, dequantize, quantize
from pallas_kernels.stage import Stage

_FLOATS = ("bfloat16", "float32")


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
    return _product(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs, jnp.dtype(out_dtype), None, None, stage)


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
    """See `pallas_kernels.grouped_matmul.grouped_gate_up`; an 8-bit `out_dtype` gives a QTensor with 1x128 scales.

    Where the up matrix does not begin with a whole lane, gate and up are multiplied as one and activated after.
    """
    dtype = jnp.dtype(out_dtype)
    in_8_bits = dtype.itemsize == 1
    kernel_dtype = jnp.dtype(jnp.float32) if in_8_bits else dtype
    columns = rhs.shape[1 if transpose_rhs else 2] // 2
    if columns % tiling.LANES:
        h = _product(
            lhs, rhs, group_sizes, bias, group_offset, transpose_rhs, jnp.dtype(jnp.float32), None, None, stage
        )
        out = gated_halves(h, activation, activation_limit).astype(kernel_dtype)
        # The kernel has cleared the rows that no group owns, and every activation of zeros is zero.
    else:
        out = _product(
            lhs,
            rhs,
            group_sizes,
            bias,
            group_offset,
            transpose_rhs,
            kernel_dtype,
            activation,
            activation_limit,
            stage,
        )
    return quantize(out, dtype, scaling="1x128") if in_8_bits else out


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

    Operands in 8 bits are dequantised first, to the dtype of the other one: scales that change along the rows, which
    are summed over, cannot be applied after.
    """
    chip = tpu_chip()
    dtype = next((x.dtype for x in (lhs, dout) if not isinstance(x, QTensor)), jnp.dtype(jnp.bfloat16))
    left, right = (dequantize(x, dtype) if isinstance(x, QTensor) else x for x in (lhs, dout))
    multiply = _multiply_dtype(chip, left, right)
    out = jnp.dtype(out_dtype)
    _check_float("out_dtype", out)
    shape = (num_groups, left.shape[1], right.shape[1])
    if 0 in (left.shape[0], *shape):
        return jnp.zeros(shape, out) if onto is None else onto
    return drhs.grouped_drhs(
        left.astype(multiply),
        right.astype(multiply),
        group_sizes,
        jnp.asarray(group_offset, jnp.int32),
        onto,
        num_groups,
        out,
        drhs.pick(chip, left.shape[0], shape, multiply, out, adds=onto is not None),
        vmem_limit_bytes=tiling.vmem_limit(chip),
    )


def grouped_matmul_of_columns(
    lhs: Columns,
    dout: Columns,
    group_sizes: jax.Array,
    *,
    onto: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul.grouped_matmul_of_columns`."""
    chip, out = tpu_chip(), jnp.dtype(out_dtype)
    _check_float("out_dtype", out)
    limit = tiling.vmem_limit(chip)
    return of_columns.grouped_drhs(lhs, dout, group_sizes, onto, out, chip, vmem_limit_bytes=limit)


def _product(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    group_offset: jax.Array | int,
    k_major: bool,
    out_dtype: jnp.dtype,
    activation: Activation | None,
    activation_limit: float | None,
    stage: Stage,
) -> jax.Array:
    chip = tpu_chip()
    multiply = _multiply_dtype(chip, lhs, rhs)
    _check_float("out_dtype", out_dtype)
    (num_rows, depth), num_groups = lhs.shape, rhs.shape[0]
    halves = 2 if activation else 1
    columns = rhs.shape[1 if k_major else 2] // halves
    if 0 in (num_rows, columns):
        return jnp.zeros((num_rows, columns), out_dtype)
    if depth == 0:
        lhs, rhs = (jnp.zeros(x.shape[:-2] + tuple(d or 1 for d in x.shape[-2:]), multiply) for x in (lhs, rhs))
        depth = 1
    left, left_scale, tensor_scale, lhs_block = lhs_scales(lhs)
    right, right_scale, rhs_kind, rhs_block = rhs_scales(rhs, k_major, tensor_scale)
    blocks = {block for block in (lhs_block, rhs_block) if block}
    if len(blocks) > 1:
        raise Unsupported(f"scales of lhs and rhs must come in blocks of equal depth, got {lhs_block} and {rhs_block}")
    arithmetic = Arithmetic(
        out_dtype,
        multiply,
        None if left_scale is None else "block" if lhs_block else "row",
        rhs_kind,
        blocks.pop() if blocks else depth,
        k_major,
        activation,
        activation_limit,
    )
    sublanes = 32 // min(left.dtype.itemsize, out_dtype.itemsize)
    cores = cores_of_a_device(chip)
    problem = tiling.Problem(
        num_rows=-(-num_rows // sublanes) * sublanes,
        num_groups=num_groups,
        depth=depth,
        columns=columns,
        halves=halves,
        lhs_itemsize=left.dtype.itemsize,
        rhs_itemsize=right.dtype.itemsize,
        out_itemsize=out_dtype.itemsize,
        multiply=multiply,
        sublanes=sublanes,
        lhs_scales=0 if left_scale is None else left_scale.shape[1],
        rhs_scales=0 if right_scale is None else right_scale.shape[1],
        has_bias=bias is not None,
        cores=cores,
    )
    config = tiling.pick(chip, problem)
    dtypes = {"lhs_dtype": left.dtype, "rhs_dtype": right.dtype, "out_dtype": out_dtype}
    model = grouped_gate_up_cost if activation else grouped_matmul_cost
    cost = model(num_rows, depth, columns, min(num_groups, num_rows), **dtypes)
    out = grouped_product(
        group_sizes,
        jnp.reshape(jnp.asarray(group_offset, jnp.int32), (1,)),
        Inputs(
            _strips(left, sublanes),
            None if left_scale is None else _strips(left_scale, sublanes),
            right,
            right_scale,
            None if bias is None else bias.astype(jnp.float32)[:, None],
        ),
        arithmetic,
        config,
        cores=cores,
        vmem_limit_bytes=tiling.vmem_request(chip, problem, config),
        cost=pl.CostEstimate(flops=cost.flops, bytes_accessed=cost.hbm_bytes, transcendentals=0),
        stage=stage,
    )
    return out.reshape(problem.num_rows, columns)[:num_rows]


def _strips(x: jax.Array, sublanes: int) -> jax.Array:
    """[M, K] as [M/s, s, K], padded if need be."""
    x = jnp.pad(x, ((0, -x.shape[0] % sublanes), (0, 0))) if x.shape[0] % sublanes else x
    return x.reshape(-1, sublanes, x.shape[1])


def _multiply_dtype(chip: Chip, lhs: Operand, rhs: Operand) -> jnp.dtype:
    """The dtype in which the matrix unit takes both operands.

    Raises:
      Unsupported: an operand is neither in 8 bits nor BF16 or float32.
    """
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if not isinstance(operand, QTensor):
            _check_float(name, operand.dtype)
    if lhs.dtype == rhs.dtype and lhs.dtype.itemsize == 1 and chip.is_native(lhs.dtype):
        return lhs.dtype
    wide = jnp.dtype(jnp.float32) in (lhs.dtype, rhs.dtype)
    return jnp.dtype(jnp.float32) if wide else jnp.dtype(jnp.bfloat16)


def _check_float(name: str, dtype: jnp.dtype) -> None:
    if dtype.name not in _FLOATS:
        raise Unsupported(f"TPU kernels take {' and '.join(_FLOATS)}, and QTensors as operands; {name} is {dtype.name}")

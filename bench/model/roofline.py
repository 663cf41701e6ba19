"""The roofline of an operator on a real chip: what no implementation beats.

Compute, main memory and links overlap perfectly, each at its peak; a dtype that the chip's matrix unit does not take
still saves bytes. Rows are padded to what the matrix unit takes at least.
"""

import dataclasses

import jax

from bench.model.operator_time import ExchangeKind, OperatorTime
from bench.model.shapes import OUTPUT_BYTES, AttentionShape, GemmShape, operand_dtype, up
from pallas_kernels.chips import Chip
from pallas_kernels.cost import Cost, grouped_matmul_cost

WGMMA_ROWS = 64  # rows that a GPU's matrix instruction takes at least


def gemm_cost(shape: GemmShape, dtype: jax.typing.DTypeLike) -> Cost:
    """The least work of a grouped GEMM with both operands in `dtype` and a BF16 output; every group has rows."""
    return grouped_matmul_cost(shape.G * shape.M, shape.K, shape.N, shape.G, lhs_dtype=dtype, rhs_dtype=dtype)


def roofline_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """The least time of a grouped GEMM with a BF16 output, whose arithmetic pads each group to `least_rows`.

    Raises:
      ValueError: the operands' dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    operand = operand_dtype(dtype)
    real = gemm_cost(shape, operand)
    padded = gemm_cost(dataclasses.replace(shape, M=up(shape.M, least_rows(chip, dtype))), operand)
    comp = padded.compute_seconds(chip, operand) * 1e6
    dma = real.memory_seconds(chip) * 1e6
    elapsed = max(comp, dma)
    return OperatorTime(
        name=name,
        kind="matmul",
        dtype=dtype,
        shape=shape,
        elapsed=elapsed,
        comp_elapsed=comp,
        dma_elapsed=dma,
        flops=real.flops,
        dram_traffic=real.hbm_bytes,
        dram_occupy=shape.weights * operand.itemsize,
        param=shape.weights,
        urate=real.flops / (elapsed * 1e-6 * chip.peak(operand)),
    )


def roofline_exchange(chip: Chip, kind: ExchangeKind, num_bytes: int, ep: int) -> OperatorTime:
    """The least time of an all-to-all over `ep` chips: `num_bytes` are read and written, (ep − 1) / ep of them sent.

    Raises:
      ValueError: there are several chips, and the bandwidth of their links is not known.
    """
    dma = 2 * num_bytes / chip.hbm_bandwidth * 1e6
    link = num_bytes * (ep - 1) / ep / chip.link() * 1e6 if ep > 1 else 0.0
    return OperatorTime(
        name=kind,
        kind=kind,
        elapsed=max(dma, link),
        dma_elapsed=dma,
        link_elapsed=link,
        dram_traffic=2 * num_bytes,
        comm_size=num_bytes,
    )


def roofline_attention(chip: Chip, shape: AttentionShape, dtype: str, name: str = "attention") -> OperatorTime:
    """The least time of an attention: queries and the cache read once, BF16 written, no arithmetic of the softmax.

    Raises:
      ValueError: the dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    operand = operand_dtype(dtype)
    flops = 2 * shape.B * shape.pairs * (shape.QD + shape.VD)
    padded = flops * up(shape.QS, least_rows(chip, dtype)) // shape.QS
    cache = shape.keys * (shape.QD if shape.latent else shape.QD + shape.VD) * operand.itemsize
    num_bytes = cache + shape.B * shape.QS * (shape.QD * operand.itemsize + shape.VD * OUTPUT_BYTES)
    comp, dma = padded / chip.peak(operand) * 1e6, num_bytes / chip.hbm_bandwidth * 1e6
    elapsed = max(comp, dma)
    return OperatorTime(
        name=name,
        kind="attention",
        dtype=dtype,
        shape=shape,
        elapsed=elapsed,
        comp_elapsed=comp,
        dma_elapsed=dma,
        flops=flops,
        dram_traffic=num_bytes,
        dram_occupy=cache,
        urate=flops / (elapsed * 1e-6 * chip.peak(operand)),
    )


def least_rows(chip: Chip, dtype: str) -> int:
    """Rows to which a group is padded: one wgmma on a GPU, one register tile (8 × 4 bytes) on a TPU."""
    return WGMMA_ROWS if chip.kind == "gpu" else 32 // operand_dtype(dtype).itemsize

"""The two products of a layer on the Hopper kernels alone, as `layer_stages` measures them stage by stage.

In a layer the kernels come with what surrounds them: rounding to 8 bits, choice of a backend. Here the operands are
ready.
"""

from typing import Any

import jax

from moejax import MoEConfig, MoEParams
from moejax.params import flat_halves
from pallas_kernels.backend import Unsupported
from pallas_kernels.grouped_matmul import Operand, gpu
from pallas_kernels.quantize import QTensor, quantize
from pallas_kernels.stage import Stage


def lhs_of_kernel(rows: Operand, config: MoEConfig) -> Operand:
    """Rows [R, …] as the kernel takes them: in 8 bits for "w8a8", unless they are already."""
    if config.precision != "w8a8" or isinstance(rows, QTensor):
        return rows
    return quantize(rows, config.quantization.dtype, scaling=config.quantization.lhs_scaling)


def gate_up_kernel(lhs: Operand, group_sizes: jax.Array, params: MoEParams, config: MoEConfig, stage: Stage) -> Operand:
    """Gate/up with its activation: [R, H] -> [R, I].

    Raises:
      Unsupported: no Hopper kernel does this.
    """
    bias = params.gate_up_bias
    return gpu.grouped_gate_up(
        lhs,
        flat_halves(params.gate_up),
        group_sizes,
        bias=None if bias is None else bias.reshape(bias.shape[0], -1),
        activation=config.activation,
        activation_limit=config.activation_limit,
        **_common(params.gate_up, config, stage),
    )


def down_kernel(lhs: Operand, group_sizes: jax.Array, params: MoEParams, config: MoEConfig, stage: Stage) -> Operand:
    """Down: [R, I] -> [R, H].

    Raises:
      Unsupported: no Hopper kernel does this.
    """
    return gpu.grouped_matmul(
        lhs, params.down, group_sizes, bias=params.down_bias, **_common(params.down, config, stage)
    )


def _common(weights: Operand, config: MoEConfig, stage: Stage) -> dict[str, Any]:
    if config.backend not in ("auto", "pallas_gpu"):
        raise Unsupported(f"backend {config.backend} is not the Hopper kernel")
    return {"group_offset": 0, "transpose_rhs": isinstance(weights, QTensor), "out_dtype": config.dtype, "stage": stage}

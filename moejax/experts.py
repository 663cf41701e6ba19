"""The gated MLP that applies some experts to rows sorted by expert: two kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.params import flat_halves
from pallas_kernels.activations import Activation
from pallas_kernels.grouped_matmul import (
    Operand,
    grouped_gate_up,
    grouped_gate_up_in_8_bits,
    grouped_matmul,
    result_can_stay,
)
from pallas_kernels.quantize import QTensor


def expert_mlp(
    rows: Operand,
    group_sizes: jax.Array,
    gate_up: Operand,
    down: Operand,
    config: MoEConfig,
    *,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    activation: tuple[Activation, float | None] | None = None,
    stays_in_8_bits: bool = False,
) -> jax.Array:
    """down(act(gate(row)) · up(row)) with the weights of each row's expert: two kernels.

    Args:
      rows: [R, H], sorted by expert; a QTensor takes no gradient.
      group_sizes: int32 [L], rows of each of the L experts whose weights are given.
      gate_up: [L, H, 2, I], or a QTensor [L, 2, I, H].
      down: [L, I, H], or a QTensor [L, H, I].
      config: activation, precision, dtype, backend.
      gate_up_bias: [L, 2, I] or None.
      down_bias: [L, H] or None.
      activation: with its clamp, in the place of the configuration's.
      stays_in_8_bits: has kernel one round its rows to 8 bits itself, where the configuration's scales allow that. No
        gradient passes then.

    Returns:
      [R, H] in config.dtype; zeros past the sum of group_sizes.
    """
    h: Operand
    name, limit = activation or (config.activation, config.activation_limit)
    width = down.shape[2 if isinstance(down, QTensor) else 1]
    if stays_in_8_bits and result_can_stay(config.quantization, width):
        h = grouped_gate_up_in_8_bits(
            rows,
            flat_halves(gate_up),
            group_sizes,
            dtype=config.quantization.dtype,
            bias=_flat_bias(gate_up_bias),
            activation=name,
            activation_limit=limit,
            **_common(gate_up, config),
        )
    else:
        h = gate_up_projection(rows, group_sizes, gate_up, config, bias=gate_up_bias, activation=(name, limit))
    return down_projection(h, group_sizes, down, config, bias=down_bias)


def gate_up_projection(
    rows: Operand,
    group_sizes: jax.Array,
    gate_up: Operand,
    config: MoEConfig,
    *,
    bias: jax.Array | None = None,
    activation: tuple[Activation, float | None] | None = None,
) -> jax.Array:
    """Kernel one of `expert_mlp`: rows [R, H] -> [R, I], in float32 when kernel two will round it to 8 bits."""
    # Rounding to BF16 on the way to 8 bits would round twice, and wrongly for one value in thirty.
    out_dtype = jnp.float32 if config.precision == "w8a8" else config.dtype
    name, limit = activation or (config.activation, config.activation_limit)
    return grouped_gate_up(
        rows,
        flat_halves(_ready(gate_up, config)),
        group_sizes,
        bias=_flat_bias(bias),
        activation=name,
        activation_limit=limit,
        preferred_element_type=out_dtype,
        **_common(gate_up, config),
    )


def down_projection(
    h: Operand, group_sizes: jax.Array, down: Operand, config: MoEConfig, *, bias: jax.Array | None = None
) -> jax.Array:
    """Kernel two of `expert_mlp`: h [R, I] -> [R, H] in config.dtype."""
    return grouped_matmul(
        h, _ready(down, config), group_sizes, bias=bias, preferred_element_type=config.dtype, **_common(down, config)
    )


def _ready(weights: Operand, config: MoEConfig) -> Operand:
    """Weights that are to be rounded to 8 bits are rounded from the precision that they are kept in, if they come so.

    Over an FSDP axis they have been cast to `config.dtype`, in which they travel.
    """
    return weights if config.precision == "w8a8" or isinstance(weights, QTensor) else weights.astype(config.dtype)


def _flat_bias(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.reshape(bias.shape[0], -1)


def _common(weights: Operand, config: MoEConfig) -> dict[str, Any]:
    return {
        "transpose_rhs": isinstance(weights, QTensor),
        "quantization": config.quantization if config.precision == "w8a8" else None,
        "backend": config.backend,
    }


def shared_mlp(
    x: jax.Array, gate_up: Operand, down: Operand, config: MoEConfig, *, stays_in_8_bits: bool = False
) -> jax.Array:
    """The shared expert on every token, as a group of one: x [T, H], gate_up [H, 2, S], down [S, H] -> [T, H]."""
    gate_up, down = jax.tree.map(lambda leaf: leaf[None], (gate_up, down))
    group_sizes = jnp.array([x.shape[0]], jnp.int32)
    return expert_mlp(
        x,
        group_sizes,
        gate_up,
        down,
        config,
        activation=config.of_shared_expert,
        stays_in_8_bits=stays_in_8_bits,
    )

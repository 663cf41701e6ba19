"""The experts: the parameters of a layer, and the gated MLP that applies some experts to rows sorted by expert."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from pallas_kernels.grouped_matmul import (
    Operand,
    grouped_gate_up,
    grouped_gate_up_in_8_bits,
    grouped_matmul,
    result_can_stay,
)
from pallas_kernels.quantize import QTensor, quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEParams:
    """The parameters of one layer; what the configuration leaves out is None.

    Attributes:
      router_kernel: [H, E].
      gate_up: [E, H, 2I], gate in the first I columns, up in the last I. For serving, a QTensor [E, 2I, H].
      down: [E, I, H]. For serving, a QTensor [E, H, I]: 8-bit weights lie with the dimension that is summed over last,
        as Hopper needs them (and as checkpoints hold them).
      router_bias: [E].
      correction_bias: [E], not trained by gradients.
      gate_up_bias: [E, 2I].
      down_bias: [E, H].
      shared_gate_up: [H, 2S], S the width of the shared expert; a QTensor [2S, H].
      shared_down: [S, H]; a QTensor [H, S].
    """

    router_kernel: Any
    gate_up: Any
    down: Any
    router_bias: Any = None
    correction_bias: Any = None
    gate_up_bias: Any = None
    down_bias: Any = None
    shared_gate_up: Any = None
    shared_down: Any = None


EXPERT_FIELDS = ("gate_up", "down", "gate_up_bias", "down_bias")
"""The parameters that are split over the expert axis; all others are held by every chip."""

SHARED_FIELDS = ("shared_gate_up", "shared_down")
"""The parameters of the shared expert."""

EXPERT_WEIGHTS = ("gate_up", "down", "shared_gate_up", "shared_down")
"""The matrices of the experts, which "w8a8" holds in 8 bits."""


def param_shapes(config: MoEConfig) -> MoEParams:
    """The shape of every parameter that `config` has, None for those that it has not."""
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_experts
    shared = config.shared_intermediate_size
    return MoEParams(
        router_kernel=(hidden, experts),
        gate_up=(experts, hidden, 2 * width),
        down=(experts, width, hidden),
        router_bias=(experts,) if config.router_bias else None,
        correction_bias=(experts,) if config.correction_bias else None,
        gate_up_bias=(experts, 2 * width) if config.expert_bias else None,
        down_bias=(experts, hidden) if config.expert_bias else None,
        shared_gate_up=(hidden, 2 * shared) if shared else None,
        shared_down=(shared, hidden) if shared else None,
    )


def check_params(params: MoEParams, config: MoEConfig) -> None:
    """Raises ValueError, naming the parameter, unless `params` are those of `config`."""
    _check(params, config, [field.name for field in dataclasses.fields(MoEParams)])


def check_expert_params(params: MoEParams, config: MoEConfig) -> None:
    """`check_params` without the router's parameters."""
    _check(params, config, [*EXPERT_FIELDS, *SHARED_FIELDS])


def _check(params: MoEParams, config: MoEConfig, names: list[str]) -> None:
    expected = param_shapes(config)
    for name in names:
        param, shape = getattr(params, name), getattr(expected, name)
        if isinstance(param, QTensor) and shape is not None:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if (param is None) != (shape is None) or (param is not None and tuple(param.shape) != shape):
            got = None if param is None else list(param.shape)
            want = "None (the configuration has none)" if shape is None else list(shape)
            raise ValueError(f"params.{name} must be {want}, got {got}")


def quantize_params(params: MoEParams, config: MoEConfig) -> MoEParams:
    """The layer for serving in 8 bits: the weights of all experts as QTensors (see `MoEParams`), the rest as it was."""
    q = config.quantization

    def to_8_bits(weights: Operand | None) -> QTensor | None:
        if weights is None or isinstance(weights, QTensor):
            return weights
        return quantize(weights, q.dtype, scaling=q.rhs_scaling).mT

    return dataclasses.replace(params, **{name: to_8_bits(getattr(params, name)) for name in EXPERT_WEIGHTS})


def expert_mlp(
    rows: Operand,
    group_sizes: jax.Array,
    gate_up: Operand,
    down: Operand,
    config: MoEConfig,
    *,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    stays_in_8_bits: bool = False,
) -> jax.Array:
    """down(act(gate(row)) · up(row)) with the weights of each row's expert: two kernels.

    Args:
      rows: [R, H], sorted by expert; a QTensor takes no gradient.
      group_sizes: int32 [L], rows of each of the L experts whose weights are given.
      gate_up: [L, H, 2I], or a QTensor [L, 2I, H].
      down: [L, I, H], or a QTensor [L, H, I].
      config: activation, precision, dtype, backend.
      gate_up_bias: [L, 2I] or None.
      down_bias: [L, H] or None.
      stays_in_8_bits: has kernel one round its rows to 8 bits itself, where the configuration's scales allow that. No
        gradient passes then.

    Returns:
      [R, H] in config.dtype; zeros past the sum of group_sizes.
    """
    h: Operand
    width = down.shape[2 if isinstance(down, QTensor) else 1]
    if stays_in_8_bits and result_can_stay(config.quantization, width):
        h = grouped_gate_up_in_8_bits(
            rows,
            gate_up,
            group_sizes,
            dtype=config.quantization.dtype,
            bias=gate_up_bias,
            activation=config.activation,
            activation_limit=config.activation_limit,
            **_common(gate_up, config),
        )
    else:
        h = gate_up_projection(rows, group_sizes, gate_up, config, bias=gate_up_bias)
    return down_projection(h, group_sizes, down, config, bias=down_bias)


def gate_up_projection(
    rows: Operand, group_sizes: jax.Array, gate_up: Operand, config: MoEConfig, *, bias: jax.Array | None = None
) -> jax.Array:
    """Kernel one of `expert_mlp`: rows [R, H] -> [R, I], in float32 when kernel two will round it to 8 bits."""
    # Rounding to BF16 on the way to 8 bits would round twice, and wrongly for one value in thirty.
    out_dtype = jnp.float32 if config.precision == "w8a8" else config.dtype
    return grouped_gate_up(
        rows,
        _ready(gate_up, config),
        group_sizes,
        bias=bias,
        activation=config.activation,
        activation_limit=config.activation_limit,
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
    """Weights that are to be rounded to 8 bits are rounded once, from the precision that they are kept in."""
    return weights if config.precision == "w8a8" or isinstance(weights, QTensor) else weights.astype(config.dtype)


def _common(weights: Operand, config: MoEConfig) -> dict[str, Any]:
    return {
        "transpose_rhs": isinstance(weights, QTensor),
        "quantization": config.quantization if config.precision == "w8a8" else None,
        "backend": config.backend,
    }


def shared_mlp(
    x: jax.Array, gate_up: Operand, down: Operand, config: MoEConfig, *, stays_in_8_bits: bool = False
) -> jax.Array:
    """The shared expert on every token, as a group of one: x [T, H], gate_up [H, 2S], down [S, H] -> [T, H]."""
    gate_up, down = jax.tree.map(lambda leaf: leaf[None], (gate_up, down))
    group_sizes = jnp.array([x.shape[0]], jnp.int32)
    return expert_mlp(x, group_sizes, gate_up, down, config, stays_in_8_bits=stays_in_8_bits)

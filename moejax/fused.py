"""The experts of a layer as one function, in the layout that serving engines keep weights in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_in_8_bits, grouped_matmul, result_can_stay
from pallas_kernels.quantize import Operand, Quantization, block_shape, quantize
from sharding.expert_parallel import Transport, expert_parallel


def fused_experts(
    hidden_states: jax.Array,
    w1: Operand,
    w2: Operand,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    b1: jax.Array | None = None,
    b2: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    quantization: Quantization | None = None,
    ep_axis: str | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](hidden_states[t]): dispatch, two kernels, combine.

    Kernel one is gate/up, bias and activation; its result stays in 8 bits for kernel two where `quantization` scales
    activations by "1x128". With `quantization` the hidden states are rounded before they are copied to their experts,
    once for each token; no gradient passes then. Use `moejax.moe` to train in 8 bits.

    Args:
      hidden_states: [T, H], BF16, FP16 or float32.
      w1: [E, 2I, H], the rows of the gate first, then those of up; an array or a QTensor.
      w2: [E, H, I], likewise.
      topk_weights: [T, K].
      topk_ids: integer [T, K]; an id outside [0, E) makes no choice.
      b1: [E, 2I] or None.
      b2: [E, H] or None.
      activation: silu, gelu, gelu_tanh or swigluoai.
      activation_limit: clamp before the activation, or None.
      quantization: how activations (and weights that are not QTensors) are rounded to 8 bits; None multiplies operands
        as they are.
      ep_axis: inside `jax.shard_map`, the mesh axis that experts are split over: w1, w2, b1 and b2 then hold the
        experts of this chip, hidden_states, topk_weights and topk_ids this chip's tokens, with ids over all chips.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [T, H] in the dtype of hidden_states.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check(hidden_states, w1, w2, topk_weights, topk_ids, b1, b2)
    ep = 1 if ep_axis is None else jax.lax.axis_size(ep_axis)
    inputs: Operand = hidden_states
    wire_scaling = None
    if quantization is not None and block_shape(quantization.lhs_scaling)[0] == 1:
        if ep == 1:
            inputs = quantize(hidden_states, quantization.dtype, scaling=quantization.lhs_scaling)
        elif quantization.dtype != "int8":
            wire_scaling = quantization.lhs_scaling
    experts = functools.partial(
        _experts,
        out_dtype=hidden_states.dtype,
        activation=activation,
        activation_limit=activation_limit,
        quantization=quantization,
        backend=backend,
    )
    y, _ = expert_parallel(
        inputs,
        topk_weights.astype(jnp.float32),
        topk_ids,
        experts,
        {"w1": w1, "w2": w2, "b1": b1, "b2": b2},
        num_experts=w1.shape[0] * ep,
        transport=Transport(
            expert_axis=ep_axis,
            ep=ep,
            token_axes=() if ep_axis is None else (ep_axis,),
            wire_scaling=wire_scaling,
            backend=backend,
        ),
        preferred_element_type=hidden_states.dtype,
    )
    return y


def _experts(
    params: dict[str, Any],
    rows: Operand,
    group_sizes: jax.Array,
    *,
    out_dtype: jnp.dtype,
    activation: Activation,
    activation_limit: float | None,
    quantization: Quantization | None,
    backend: str,
) -> jax.Array:
    w1, w2 = params["w1"], params["w2"]
    common: dict[str, Any] = {"transpose_rhs": True, "quantization": quantization, "backend": backend}
    gate_up = {"bias": params["b1"], "activation": activation, "activation_limit": activation_limit, **common}
    h: Operand
    if quantization is not None and result_can_stay(quantization, w2.shape[2]):
        h = grouped_gate_up_in_8_bits(rows, w1, group_sizes, dtype=quantization.dtype, **gate_up)
    else:
        h_dtype = out_dtype if quantization is None else jnp.dtype(jnp.float32)
        h = grouped_gate_up(rows, w1, group_sizes, preferred_element_type=h_dtype, **gate_up)
    return grouped_matmul(h, w2, group_sizes, bias=params["b2"], preferred_element_type=out_dtype, **common)


def _check(x, w1: Operand, w2: Operand, topk_weights, topk_ids, b1, b2) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(f"hidden_states must be BF16, FP16 or float32 [T, H], got {x.dtype}{list(x.shape)}")
    if w1.ndim != 3 or w1.shape[1] % 2 or w1.shape[2] != x.shape[1]:
        raise ValueError(f"w1 must be [E, 2I, H] with H = {x.shape[1]}, got {list(w1.shape)}")
    experts, width, hidden = w1.shape[0], w1.shape[1] // 2, x.shape[1]
    expected = {
        "w2": (w2, (experts, hidden, width), "[E, H, I]"),
        "b1": (b1, (experts, 2 * width), "[E, 2I]"),
        "b2": (b2, (experts, hidden), "[E, H]"),
        "topk_weights": (topk_weights, topk_ids.shape, "[T, K] as topk_ids"),
    }
    for name, (value, shape, layout) in expected.items():
        if value is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name} must be {layout} = {list(shape)}, got {list(value.shape)}")
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0] or not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        raise ValueError(
            f"topk_ids must be integer [T, K] with T = {x.shape[0]}, got {topk_ids.dtype}{list(topk_ids.shape)}"
        )

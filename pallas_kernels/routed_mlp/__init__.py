"""The experts of a few tokens, from their choices to the weighted sum: what serving one to eight of them is made of.

    y[t] = residual[t] + Σ_k topk_weights[t, k] · down_e(act(gate_e · x[t]) · (up_e · x[t])),  e = topk_ids[t, k]

It is what plan, dispatch, the two grouped products and combine do for any number of tokens. Where tokens are few that
is a chain of short kernels, each of which waits for the one before; one kernel instead reads weights all the while.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.backend import Unsupported
from pallas_kernels.dtypes import is_float
from pallas_kernels.primitive import Operator
from pallas_kernels.quantize import QTensor, ToRound, check_qtensor, check_row_scales
from pallas_kernels.routed_mlp.reference import in_8_bits
from pallas_kernels.tracing.concrete import is_symbolic
from pallas_kernels.tracing.target import target_platform


def routed_mlp(
    x: QTensor | ToRound,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    gate_up: QTensor,
    down: QTensor,
    *,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    backend: str = "auto",
) -> jax.Array:
    """The weighted sum of what the chosen experts make of each token. Takes no gradient.

    Args:
      x: [T, H], with scales of its rows or of 128 of their columns; or what is to be rounded to such.
      topk_weights: float32 [T, K].
      topk_ids: int32 [T, K]; an id outside [0, E) makes no choice.
      gate_up: [E, 2I, H], gate first.
      down: [E, H, I].
      gate_up_bias: [E, 2I] or None.
      down_bias: [E, H] or None.
      residual: [T, H], BF16, FP16 or float32, what the sum is added to before it is rounded; None for nothing.
      activation: of the gate.
      activation_limit: the clamp before it, or None.
      out_dtype: of the result.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [T, H]. Between the products rows are rounded to 8 bits as `x` is.

    Raises:
      ValueError: shapes or dtypes do not fit.
      Unsupported: the named backend, if it has a kernel, cannot do it.
    """
    check_activation(activation, activation_limit)
    x = jax.lax.stop_gradient(x)
    _check(x, topk_weights, topk_ids, gate_up, down, gate_up_bias, down_bias, residual, jnp.dtype(out_dtype))
    return _routed_mlp(
        backend,
        x=x,
        topk_weights=topk_weights.astype(jnp.float32),
        topk_ids=topk_ids,
        gate_up=gate_up,
        down=down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        residual=residual,
        activation=activation,
        activation_limit=activation_limit,
        out_dtype=jnp.dtype(out_dtype),
    )


def pays(x: QTensor | ToRound, topk_ids: jax.Array, gate_up: QTensor, down: QTensor) -> bool:
    """Whether the kernel takes these operands on the chip that is traced for.

    It is then faster than plan, grouped products and combine, or as fast: docs/prefetch.md has figures.
    """
    if target_platform() != "gpu" or is_symbolic(*x.shape, *topk_ids.shape):
        return False
    from pallas_kernels.routed_mlp import gpu

    try:
        gpu.plan_work(jax.eval_shape(in_8_bits, x), topk_ids, gate_up, down)
    except Unsupported:
        return False
    return True


_routed_mlp = Operator("routed_mlp", "routed_mlp")


def _check(x, topk_weights, topk_ids, gate_up, down, gate_up_bias, down_bias, residual, out_dtype: jnp.dtype) -> None:
    if isinstance(x, ToRound):
        x = jax.eval_shape(in_8_bits, x)
    for name, operand, ndim in (("x", x, 2), ("gate_up", gate_up, 3), ("down", down, 3)):
        if not isinstance(operand, QTensor) or operand.ndim != ndim:
            got = f"{operand.dtype}{list(operand.shape)}"
            raise ValueError(f"{name} must be a QTensor of {ndim} dimensions, got {type(operand).__name__} {got}")
    if residual is not None and not is_float(residual.dtype):
        raise ValueError(f"residual must be BF16, FP16 or float32, got {residual.dtype}")
    if topk_ids.ndim != 2 or topk_ids.dtype != jnp.int32:
        raise ValueError(f"topk_ids must be int32 [T, K], got {topk_ids.dtype}{list(topk_ids.shape)}")
    if not is_float(out_dtype):
        raise ValueError(f"out_dtype must be BF16, FP16 or float32, got {out_dtype}")
    check_row_scales("x", x)
    check_qtensor("gate_up", gate_up)
    check_qtensor("down", down)
    tokens, hidden = x.shape
    experts, halves, _ = gate_up.shape
    expected = {
        "topk_weights": (topk_weights, topk_ids.shape),
        "topk_ids": (topk_ids, (tokens, *topk_ids.shape[1:])),
        "gate_up": (gate_up, (experts, halves, hidden)),
        "down": (down, (experts, hidden, halves // 2)),
        "gate_up_bias": (gate_up_bias, (experts, halves)),
        "down_bias": (down_bias, (experts, hidden)),
        "residual": (residual, (tokens, hidden)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(array.shape)}")


__all__ = ["pays", "routed_mlp"]

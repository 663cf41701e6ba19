"""The experts of a layer as one function, in the layout that serving engines keep weights in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.checks import check_residual, require
from moejax.experts import ExpertMath, ExpertWeights
from moejax.packing import GateUpOrder, Layout, split_gate_up
from moejax.routed_experts import routed_experts
from pallas_kernels.activations import Activation
from pallas_kernels.arrays import require_arrays, require_given_arrays
from pallas_kernels.dtypes import is_float
from pallas_kernels.grouped_matmul.checks import check_kind
from pallas_kernels.plan import in_int32
from pallas_kernels.quantize import Operand, QTensor, Quantization
from sharding.exchange import Way, check_transport
from sharding.partition import Axes
from sharding.placement import Placement


def fused_experts(
    hidden_states: jax.Array,
    w1: Operand,
    w2: Operand,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    b1: jax.Array | None = None,
    b2: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    quantization: Quantization | None = None,
    layout: Layout = "out_in",
    gate_up_order: GateUpOrder = "gate_first",
    ep_axis: str | None = None,
    transport: str = "auto",
    backend: str = "auto",
) -> jax.Array:
    """Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](hidden_states[t]): dispatch, two kernels, combine.

    Kernel one is gate/up, bias and activation; its result stays in 8 bits for kernel two where `quantization` scales
    activations by "1x128", and the hidden states are rounded before they are copied to their experts, once for each
    token. Where a gradient is asked for, each product rounds its operands instead, and gradients pass straight through.

    Args:
      hidden_states: [T, H], BF16, FP16 or float32.
      w1: [E, 2I, H], or as `layout` and `gate_up_order` say; an array or a QTensor.
      w2: [E, H, I], or as `layout` says, likewise.
      topk_weights: [T, K].
      topk_ids: integer [T, K]; an id outside [0, E) makes no choice.
      b1: [E, 2I] in the order of w1, or None.
      b2: [E, H] or None.
      residual: [T, H], floating point of 16 or 32 bits, what the sum is added to; None for nothing.
      activation: silu, gelu, gelu_tanh, swigluoai or relu2.
      activation_limit: clamp before the activation, or None.
      quantization: how activations (and weights that are not QTensors) are rounded to 8 bits; None multiplies operands
        as they are.
      layout: "out_in" for w1 [E, 2I, H] and w2 [E, H, I], "in_out" for [E, H, 2I] and [E, I, H]. Hopper GPUs multiply
        8-bit weights in the first only.
      gate_up_order: where gate and up lie in w1: "gate_first", "up_first" or "interleaved". Kernels take the first;
        weights in another order are rearranged in every call, so prefer to call `pack_experts` once.
      ep_axis: inside `jax.shard_map`, the mesh axis that experts are split over: w1, w2, b1 and b2 then hold the
        experts of this chip, hidden_states, topk_weights and topk_ids this chip's tokens, with ids over all chips.
      transport: what carries rows between the chips of `ep_axis`, as in `MoEConfig`.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [T, H] in the dtype of hidden_states.

    Raises:
      TypeError: what must be an array is none.
      ValueError: shapes or dtypes do not fit, `transport` is unknown, or no `jax.shard_map` has the axis.
    """
    check_transport(transport)
    is_known = quantization is None or isinstance(quantization, Quantization)
    require(is_known, "quantization", "a Quantization, or None for products as operands come", quantization)
    require_given_arrays(hidden_states=hidden_states, w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids)
    require_arrays(b1=b1, b2=b2)
    w1, b1 = _gate_first(w1, b1, layout, gate_up_order)
    _check(hidden_states, w1, w2, topk_weights, topk_ids, b1, b2, layout)
    check_residual(residual, hidden_states)
    num_local, ep = w1.shape[0], 1 if ep_axis is None else _size_of(ep_axis)
    names = () if ep_axis is None else (ep_axis,)
    axes = Axes(expert=names, tokens=names, sizes=tuple((name, ep) for name in names))
    math = ExpertMath(activation, activation_limit, quantization, hidden_states.dtype, backend)
    way = Way(Placement(num_local * ep, ep), axes, backend=backend, transport=transport)
    run = functools.partial(_run, k_major=layout == "out_in", way=way)
    params = {"w1": w1, "w2": w2, "b1": b1, "b2": b2}
    return math.serve_or_train(
        run, hidden_states, topk_weights.astype(jnp.float32), in_int32(topk_ids, num_local * ep), params, residual
    )


def _size_of(ep_axis: str) -> int:
    """How many chips the axis has here.

    Raises:
      ValueError: there is no such axis here.
    """
    try:
        return jax.lax.axis_size(ep_axis)
    except NameError:
        raise ValueError(f"ep_axis must be an axis of the jax.shard_map around the call, got {ep_axis!r}") from None


def _run(
    math: ExpertMath,
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: dict[str, Any],
    residual: jax.Array | None,
    *,
    k_major: bool,
    way: Way,
) -> jax.Array:
    """The exchange with `math` as the experts."""
    rows_of_x, biases = math.rounded(x, late=way.is_on_one_chip), (params["b1"], params["b2"])
    if way.axes.ep == 1 and k_major:
        y = math.few_tokens(
            rows_of_x,
            topk_weights,
            topk_ids,
            params["w1"],
            params["w2"],
            biases=biases,
            residual=residual,
            preferred_element_type=x.dtype,
        )
        if y is not None:
            return y

    weights = ExpertWeights(params["w1"], params["w2"], *biases, (k_major,) * 2)
    operands = math, rows_of_x, topk_weights, topk_ids, weights, way
    return routed_experts(*operands, residual=residual, preferred_element_type=x.dtype)


def _gate_first(
    w1: Operand, b1: jax.Array | None, layout: Layout, order: GateUpOrder
) -> tuple[Operand, jax.Array | None]:
    """Gate and up, and their biases, as the kernels take them."""
    if layout not in ("out_in", "in_out"):
        raise ValueError(f"layout must be 'out_in' or 'in_out', got {layout!r}")
    if order == "gate_first":
        return w1, b1
    if isinstance(w1, QTensor):
        raise ValueError(
            f"w1 in 8 bits must lie gate first, got gate_up_order={order!r}: blocks of scales cannot be taken apart; "
            "reorder the weights before they are quantised"
        )

    def joined(x: jax.Array) -> jax.Array:
        both = split_gate_up(x, order)
        return both.reshape(*both.shape[:-2], -1)

    w1 = joined(w1.mT).mT if layout == "out_in" else joined(w1)
    return w1, None if b1 is None else joined(b1)


def _check(x, w1: Operand, w2: Operand, topk_weights, topk_ids, b1, b2, layout: Layout) -> None:
    if x.ndim != 2 or not is_float(x.dtype):
        raise ValueError(f"hidden_states must be BF16, FP16 or float32 [T, H], got {x.dtype}{list(x.shape)}")
    check_kind("w1", w1)
    check_kind("w2", w2)
    rows, columns = (1, 2) if layout == "out_in" else (2, 1)
    if w1.ndim != 3 or w1.shape[rows] % 2 or w1.shape[columns] != x.shape[1]:
        wanted = "[E, 2I, H]" if layout == "out_in" else "[E, H, 2I]"
        raise ValueError(f"w1 must be {wanted} with H = {x.shape[1]} in layout {layout!r}, got {list(w1.shape)}")
    experts, width, hidden = w1.shape[0], w1.shape[rows] // 2, x.shape[1]
    w2_layout = (
        ((experts, hidden, width), "[E, H, I]") if layout == "out_in" else ((experts, width, hidden), "[E, I, H]")
    )
    expected = {
        "w2": (w2, *w2_layout),
        "b1": (b1, (experts, 2 * width), "[E, 2I]"),
        "b2": (b2, (experts, hidden), "[E, H]"),
        "topk_weights": (topk_weights, topk_ids.shape, "[T, K] as topk_ids"),
    }
    for name, (value, shape, named) in expected.items():
        if value is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name} must be {named} = {list(shape)}, got {list(value.shape)}")
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0] or not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        raise ValueError(
            f"topk_ids must be integer [T, K] with T = {x.shape[0]}, got {topk_ids.dtype}{list(topk_ids.shape)}"
        )

"""Brings the weights of experts from the layouts of checkpoints into that of `MoEParams`.

Shapes do not always tell layouts apart (a square `down` looks the same either way round), so layouts are named:

    matrices     "out_in"       [E, 2I, H] and [E, H, I]: Mixtral, DeepSeek, Qwen (stacked)
                 "in_out"       [E, H, 2I] and [E, I, H]: gpt-oss, Llama 4
    gate and up  "gate_first"   all of gate, then all of up: Mixtral, DeepSeek, Qwen (joined), Llama 4
                 "up_first"     the other way round
                 "interleaved"  gate, up, gate, up: gpt-oss
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import QTensor

Layout = Literal["out_in", "in_out"]
GateUpOrder = Literal["gate_first", "up_first", "interleaved"]


def pack_experts(
    gate_up: jax.Array | None = None,
    down: jax.Array | None = None,
    *,
    gate: jax.Array | None = None,
    up: jax.Array | None = None,
    layout: Layout,
    gate_up_order: GateUpOrder = "gate_first",
) -> tuple[jax.Array, jax.Array]:
    """The weights of experts as `MoEParams` holds them: gate_up [E, H, 2, I] and down [E, I, H].

    Args:
      gate_up: [E, 2I, H] or [E, H, 2I], as `layout` says; None where `gate` and `up` are given.
      down: [E, H, I] or [E, I, H].
      gate: [E, I, H] or [E, H, I], where a checkpoint holds gate and up separately.
      up: the same shape.
      layout: of every matrix.
      gate_up_order: where gate and up lie in `gate_up`.

    Raises:
      ValueError: a name is unknown, or the shapes do not fit each other.
    """
    if layout not in ("out_in", "in_out"):
        raise ValueError(f"layout must be 'out_in' or 'in_out', got {layout!r}")
    if any(isinstance(weights, QTensor) for weights in (gate_up, down, gate, up)):
        raise TypeError(
            "pack_experts takes arrays: weights that are in 8 bits already go into MoEParams as QTensors [E, 2, I, H] "
            "and [E, H, I], with a scale for each block"
        )
    if down is None or (gate_up is None) == (gate is None or up is None):
        raise ValueError("give down, and either gate_up or both gate and up")
    if gate_up is None:
        assert gate is not None
        assert up is not None
        if gate.shape != up.shape or gate.ndim != 3:
            raise ValueError(
                f"gate and up must have one shape of three dimensions, got {list(gate.shape)}, {list(up.shape)}"
            )
        both = jnp.stack([_in_out(gate, layout), _in_out(up, layout)], axis=2)
    else:
        both = split_gate_up(_in_out(gate_up, layout), gate_up_order)
    packed_down = _in_out(down, layout)
    experts, hidden, _, width = both.shape
    if packed_down.shape != (experts, width, hidden):
        expected = [experts, hidden, width] if layout == "out_in" else [experts, width, hidden]
        raise ValueError(f"down must be {expected} to fit gate and up in layout {layout!r}, got {list(down.shape)}")
    return both, packed_down


def split_gate_up(matrix: jax.Array, order: GateUpOrder) -> jax.Array:
    """[..., 2I] with gate and up in this order -> [..., 2, I], gate and then up.

    Raises:
      ValueError: the order is unknown, or the last dimension is odd.
    """
    if order not in ("gate_first", "up_first", "interleaved"):
        raise ValueError(f"gate_up_order must be 'gate_first', 'up_first' or 'interleaved', got {order!r}")
    *rest, columns = matrix.shape
    if columns % 2:
        raise ValueError(f"gate and up must be of equal width, got {columns} columns for both")
    if order == "interleaved":
        return jnp.moveaxis(matrix.reshape(*rest, columns // 2, 2), -1, -2)
    both = matrix.reshape(*rest, 2, columns // 2)
    return both[..., ::-1, :] if order == "up_first" else both


def _in_out(matrix: jax.Array, layout: Layout) -> jax.Array:
    return matrix.mT if layout == "out_in" else matrix

"""What users would run instead of our grouped matrix products, called as its own documentation says.

An `Implementation` is one way to do a case: ours, or a peer's. Peers that are not installed say so.

    for peer in matmul_bf16_peers(GemmShape(8, 48, 7168, 2048)):
        print(peer.name, peer.why_not() or "is here")
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bench.model.shapes import GemmShape
from pallas_kernels.quantize import QTensor


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to do a case.

    Attributes:
      name: as the tables show it.
      package: the distribution that has it; "torch" takes torch's arrays and is timed by torch's clock.
      functions: what is timed; of several configurations, each under its name, the fastest counts.
      prepare: makes the arguments of `functions` from the inputs of the case; its time does not count.
    """

    name: str
    package: str
    functions: Mapping[str, Callable[..., Any]]
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs

    def why_not(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        if self.package == "torch":
            return why_not_torch()
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"


@functools.cache
def why_not_torch() -> str | None:
    """Why torch cannot be measured here, or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    missing = [name for name in ("_grouped_mm", "_scaled_grouped_mm", "_scaled_mm") if not hasattr(torch, name)]
    return f"torch {torch.__version__} has no {', '.join(missing)}" if missing else None


def matmul_bf16_peers(shape: GemmShape) -> tuple[Implementation, ...]:
    """For inputs lhs [M, K], rhs [G, K, N], group_sizes [G]: those that multiply in BF16."""

    def tokamax(lhs, rhs, group_sizes):
        import tokamax

        return tokamax.ragged_dot(lhs, rhs, group_sizes)

    return (
        Implementation("jax.lax.ragged_dot", "jax", {"": jax.lax.ragged_dot}),
        Implementation("tokamax.ragged_dot", "tokamax", {"": tokamax}),
        Implementation("jax ragged_dot_mgpu", "jax", _mgpu_configurations(shape)),
        Implementation("torch._grouped_mm", "torch", {"": _torch_grouped}, _torch_inputs),
    )


def matmul_fp8_peers() -> tuple[Implementation, ...]:
    """For inputs lhs [M, K] scaled per row, rhs [G, N, K] scaled per channel, group_sizes [G]: those that take FP8."""
    return (Implementation("torch._scaled_grouped_mm", "torch", {"": _torch_scaled}, _torch_inputs),)


def layer_fp8_peers() -> tuple[Implementation, ...]:
    """For inputs x [M, H], gate_up [G, 2I, H], down [G, H, I], all FP8, group_sizes [G]: a gated MLP for each group."""

    def layer(middle):
        def f(x, gate_up, down, ends):
            return _torch_scaled(QTensor(*middle(_torch_scaled(x, gate_up, ends))), down, ends)

        return f

    @functools.cache
    def compiled():
        import torch

        return torch.compile(_torch_silu_quantise)

    functions = {"eager": layer(_torch_silu_quantise), "torch.compile": layer(lambda h: compiled()(h))}
    return (Implementation("torch._scaled_grouped_mm", "torch", functions, _torch_inputs),)


def backward_bf16_peers() -> tuple[Implementation, ...]:
    """For inputs lhs [M, K], rhs [G, K, N], group_sizes [G], dout [M, N]: both gradients."""

    def ragged_dot(lhs, rhs, group_sizes, dout):
        return jax.vjp(lambda a, b: jax.lax.ragged_dot(a, b, group_sizes), lhs, rhs)[1](dout)

    def torch_backward(lhs, rhs, ends, dout):
        return _torch_grouped(dout, rhs.transpose(-2, -1), ends), _torch_grouped(lhs.t(), dout, ends)

    def prepare(lhs, rhs, group_sizes, dout):
        return *_torch_inputs(lhs, rhs, group_sizes), to_torch(dout)

    return (
        Implementation("jax.lax.ragged_dot", "jax", {"": ragged_dot}),
        Implementation("torch._grouped_mm", "torch", {"": torch_backward}, prepare),
    )


def to_torch(x: jax.Array) -> Any:
    """The same memory as a torch tensor; FP8 is copied once, as bytes, since DLPack need not know it."""
    import torch

    if x.dtype == jnp.float8_e4m3fn:
        as_bytes = jax.block_until_ready(jax.lax.bitcast_convert_type(x, jnp.uint8))
        return torch.from_dlpack(as_bytes).view(torch.float8_e4m3fn)
    return torch.from_dlpack(jax.block_until_ready(x))


def from_torch(tensors: Any) -> Any:
    """A tensor, or a tuple of them, as jax arrays."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return jax.tree.map(lambda tensor: jnp.from_dlpack(tensor.contiguous()), tensors)


def _torch_inputs(*inputs: Any) -> tuple[Any, ...]:
    """The operands, and in place of the rows per group, which come last, the row where each group ends."""
    *operands, group_sizes = inputs
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return *jax.tree.map(to_torch, tuple(operands)), to_torch(ends)


def _torch_grouped(a, b, ends):
    import torch

    return torch._grouped_mm(a, b, offs=ends, out_dtype=torch.bfloat16)


def _torch_scaled(lhs, rhs, ends):
    """Both operands are `QTensor`s of torch's arrays."""
    import torch

    return torch._scaled_grouped_mm(
        lhs.values,
        rhs.values.transpose(-2, -1),
        lhs.scale.reshape(-1),
        rhs.scale.reshape(rhs.scale.shape[0], -1),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _torch_silu_quantise(h):
    """silu(gate) · up of [M, 2I], rounded to BF16, then to FP8 with a scale for each row: values and scales."""
    import torch

    gate, up = h.float().chunk(2, dim=-1)
    product = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16).float()
    scale = product.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 448.0
    values = (product / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return values, scale


def _mgpu_configurations(shape: GemmShape) -> dict[str, Callable[..., Any]]:
    """By block_m x block_n x block_k x steps in flight x column tiles in a stripe; they fit in shared memory."""
    if shape.M <= 64:
        choices = [(64, 128, 64, 6, 1), (64, 128, 128, 4, 1)]
    else:
        choices = [(128, 128, 64, 4, 1), (128, 128, 64, 5, 8)]
    names = "block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n"
    return {
        "x".join(map(str, choice)): functools.partial(_mgpu, **dict(zip(names, choice, strict=True)))
        for choice in choices
    }


def _mgpu(lhs, rhs, group_sizes, **configuration):
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    return ragged_dot(lhs, rhs, group_sizes=group_sizes, **configuration)

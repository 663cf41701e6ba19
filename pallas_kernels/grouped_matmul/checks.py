"""What the operands of a grouped matrix product must look like."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.quantize import Operand, QTensor, RoundedWeights, Weights, check_qtensor
from pallas_kernels.tracing.concrete import is_known, is_less


def check_operands(
    lhs: Operand,
    rhs: Weights,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    group_offset: jax.Array | int,
    transpose_rhs: bool,
) -> None:
    """Raises ValueError, naming the argument, what was expected and what came, unless the operands fit together."""
    for name, operand, rank in (("lhs", lhs, 2), ("rhs", rhs, 3)):
        if operand.ndim != rank:
            layout = "[M, K]" if rank == 2 else ("[G, N, K]" if transpose_rhs else "[G, K, N]")
            raise ValueError(f"{name} must have shape {layout}, got {list(operand.shape)}")
        check_kind(name, operand)
    num_groups, depth, columns = rhs.shape if not transpose_rhs else (rhs.shape[0], rhs.shape[2], rhs.shape[1])
    if is_less(num_groups, 1):
        raise ValueError(f"rhs must hold the matrix of at least one group, got {list(rhs.shape)}")
    if depth != lhs.shape[1]:
        raise ValueError(
            f"lhs {list(lhs.shape)} and rhs {list(rhs.shape)} disagree on K: {lhs.shape[1]} and {depth}"
            + ("" if transpose_rhs or rhs.shape[2] != lhs.shape[1] else "; is rhs [G, N, K]? pass transpose_rhs=True")
        )
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be an integer vector, got {group_sizes.dtype}{list(group_sizes.shape)}")
    if is_less(group_sizes.shape[0], num_groups):
        raise ValueError(f"group_sizes has {group_sizes.shape[0]} groups, rhs has {num_groups}; it must list them all")
    if bias is not None and bias.shape != (num_groups, columns):
        raise ValueError(f"bias must have shape [G, N] = {[num_groups, columns]}, got {list(bias.shape)}")
    _check_values(group_sizes, group_offset, num_groups, lhs.shape[0])


def check_kind(name: str, operand: Weights) -> None:
    """Raises ValueError unless the operand `name` is an array of floats of 16 or 32 bits, or is in 8 bits."""
    if isinstance(operand, QTensor):
        check_qtensor(name, operand)
    elif isinstance(operand, RoundedWeights):
        check_kind(name, operand.array)
        for layout, shape in (("k_major", operand.array.mT.shape), ("n_last", operand.shape)):
            found = getattr(operand, layout)
            if found is None and layout == "n_last":
                continue
            check_qtensor(f"{name}.{layout}", found)
            dtype, got = operand.k_major.dtype, f"{found.dtype}{list(found.shape)}"
            if (found.shape, found.dtype) != (shape, dtype):
                raise ValueError(f"{name}.{layout} must be {dtype}{list(shape)}, got {got}")
    elif not jnp.issubdtype(operand.dtype, jnp.floating) or operand.dtype.itemsize == 1:
        raise ValueError(
            f"{name} must be a BF16, FP16 or float32 array, or a QTensor (8-bit values with scales), got "
            f"{operand.dtype}{list(operand.shape)}"
        )


def check_gate_up(
    lhs: Operand,
    rhs: Weights,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    group_offset: jax.Array | int,
    transpose_rhs: bool,
    activation: Activation,
    activation_limit: float | None,
) -> None:
    """The same for the fused gate/up product."""
    check_activation(activation, activation_limit)
    check_operands(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs)
    if rhs.shape[1 if transpose_rhs else 2] % 2:
        layout = "[G, 2I, H]" if transpose_rhs else "[G, H, 2I]"
        raise ValueError(f"rhs must be {layout}, gate and up of equal width, got {list(rhs.shape)}: 2I is odd")


def _check_values(group_sizes: jax.Array, group_offset: jax.Array | int, num_groups: int, num_rows: int) -> None:
    """Checks what is known at trace time; traced values, and values on other hosts, are taken on trust."""
    if is_known(group_sizes):
        sizes = np.asarray(group_sizes)
        total = sum(sizes.tolist())  # which no dtype bounds
        if sizes.size and (sizes.min() < 0 or is_less(num_rows, total)):
            raise ValueError(
                f"group_sizes must be at least 0 and sum to at most M = {num_rows}, got {sizes.tolist()} "
                f"with sum {total}"
            )
    if jnp.ndim(group_offset) != 0:
        raise ValueError(f"group_offset must be a scalar, got shape {list(jnp.shape(group_offset))}")
    largest = group_sizes.shape[0] - num_groups
    if is_known(group_offset) and (int(group_offset) < 0 or is_less(largest, int(group_offset))):
        raise ValueError(
            f"group_offset must lie in [0, {largest}] so that the {num_groups} groups of rhs fit into "
            f"{group_sizes.shape[0]} group_sizes, got {int(group_offset)}"
        )

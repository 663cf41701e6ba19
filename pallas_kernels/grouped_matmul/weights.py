"""Weights of a product, cast, or rounded to 8 bits, as its products and those of its gradients take them."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import QTensor, Quantization, quantize
from pallas_kernels.quantize_transpose import SCALING, quantize_transpose
from pallas_kernels.tracing.concrete import is_symbolic
from pallas_kernels.tracing.named import named

WEIGHTS_NAME = "moe_weights"
"""What `jax.checkpoint` knows weights as that were cast or rounded for a product from parameters of another kind."""


def cast(weights: Any, dtype: jnp.dtype | None) -> Any:
    """An array of weights in `dtype`, if there is one; what is in 8 bits stays as it is."""
    if dtype is None or not isinstance(weights, jax.Array) or weights.dtype == dtype:
        return weights
    return named(weights.astype(dtype), WEIGHTS_NAME)


def can_be_in_one_pass(quantization: Quantization) -> bool:
    """Whether weights of some sizes are rounded in this way in one pass; see `in_one_pass`."""
    return quantization.rhs_scaling == SCALING and quantization.dtype != "int8"


def in_one_pass(weights: jax.Array, quantization: Quantization) -> bool:
    """Whether there are kernels that round weights [G, K, N] in one pass, to both layouts if need be."""
    return (
        can_be_in_one_pass(quantization)
        and weights.dtype.itemsize <= 4
        and not is_symbolic(*weights.shape)
        and weights.size > 0
        and all(size % 128 == 0 for size in weights.shape[1:])
    )


def rounded(backend: str, weights: jax.Array, quantization: Quantization, *, transposed: bool) -> QTensor:
    """Weights [G, K, N], or [G, N, K] if `transposed`, in 8 bits, as [G, N, K]."""
    weights = jax.lax.stop_gradient(weights)
    if not in_one_pass(weights, quantization):
        last = weights.mT if transposed else weights
        return named(quantize(last, quantization.dtype, scaling=quantization.rhs_scaling).mT, WEIGHTS_NAME)
    layouts = quantize_transpose(
        weights, quantization.dtype, k_major=not transposed, n_last=transposed, backend=backend
    )
    found = layouts[transposed]
    assert found is not None, "it was asked for"
    return named(found, WEIGHTS_NAME)


def rounded_both_ways(
    backend: str, weights: jax.Array, quantization: Quantization, *, transposed: bool
) -> tuple[QTensor, QTensor]:
    """Weights that are rounded in one pass, see `rounded`, as [G, N, K] and as [G, K, N]."""
    layouts = quantize_transpose(jax.lax.stop_gradient(weights), quantization.dtype, backend=backend)
    k_major, n_last = reversed(layouts) if transposed else layouts
    assert k_major is not None, "it was asked for"
    assert n_last is not None, "it was asked for"
    return named((k_major, n_last), WEIGHTS_NAME)

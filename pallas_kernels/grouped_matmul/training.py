"""What an implementation does of gate/up in training beside its products: composed of these."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.gated_activation.reference import gated_activation, gated_activation_tangent
from pallas_kernels.primitive import Operands
from pallas_kernels.quantize import QTensor, dequantize

_OF_PRODUCT = ("lhs", "rhs", "group_sizes", "bias", "group_offset", "transpose_rhs", "out_dtype")


def result_by(
    gate_up: Callable[..., Any], product: Callable[..., jax.Array]
) -> Callable[..., tuple[jax.Array, QTensor | None]]:
    """`grouped_gate_up_in_training` of the implementation that has these two."""

    def grouped_gate_up_in_training(
        *,
        activation: Activation,
        activation_limit: float | None,
        row_weights: jax.Array | None,
        out_dtype: jnp.dtype,
        in_8_bits: jnp.dtype | None,
        **options: Any,
    ) -> tuple[jax.Array, QTensor | None]:
        """`grouped_gate_up`, its rows weighed, as an array and in 8 bits, if these are asked for; see `gated`.

        It is what is asked for where no gradient is: rows that are not weighed need no more than one kernel then.
        """
        if row_weights is None and in_8_bits is not None:
            rounded = gate_up(activation=activation, activation_limit=activation_limit, out_dtype=in_8_bits, **options)
            return dequantize(rounded, out_dtype), rounded
        array, rounded = gated_activation(
            product(out_dtype=out_dtype, **options),
            row_weights,
            activation=activation,
            limit=activation_limit,
            out_dtype=out_dtype,
            in_8_bits=in_8_bits,
            with_8_bits=in_8_bits is not None,
        )
        assert array is not None, "it was asked for"
        return array, rounded

    return grouped_gate_up_in_training


def tangent_by(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`grouped_gate_up_tangent` of the implementation that has the plain `product`."""

    def grouped_gate_up_tangent(
        h: jax.Array,
        terms: list[Operands],
        row_weights: jax.Array | None,
        drow_weights: jax.Array | None,
        *,
        activation: Activation,
        limit: float | None,
        out_dtype: jnp.dtype,
    ) -> jax.Array:
        """The tangent of the activation of h [M, 2I] for the sum of products `terms`, of each its operands."""
        dh = [product(**{name: term[name] for name in _OF_PRODUCT}) for term in terms]
        total = sum(dh[1:], start=dh[0]) if dh else None
        options: Any = {"activation": activation, "limit": limit, "out_dtype": out_dtype}
        return gated_activation_tangent(h, total, row_weights, drow_weights, **options)

    return grouped_gate_up_tangent

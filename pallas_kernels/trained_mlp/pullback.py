"""The pullback of experts in training.

Cotangents of rows [R, H] are those of their tokens: they are rounded token by token, and copied to rows then. In 8 bits
a gradient of weights takes `Columns` of both of its factors, for which tokens are gathered as they are rounded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.columns import Columns
from pallas_kernels.gated_activation import gradients as activation
from pallas_kernels.grouped_matmul import grouped_matmul_of_columns
from pallas_kernels.grouped_matmul.gradients import correlated, for_dlhs
from pallas_kernels.grouped_matmul.gradients import multiplied as product
from pallas_kernels.moved_rows import dispatched
from pallas_kernels.plan import Plan
from pallas_kernels.primitive import Operands, is_asked_for
from pallas_kernels.quantize import QTensor, dequantize
from pallas_kernels.quantize_columns import quantize_columns
from pallas_kernels.quantize_rows import SCALING, rows_in_8_bits
from pallas_kernels.tracing.gradient_refs import accumulate
from pallas_kernels.trained_mlp.settings import Settings
from pallas_kernels.trained_mlp.steps import activated, as_matrices, groups, summed, tokens_again

Factor = jax.Array | Columns
"""What a gradient of weights, a sum over rows, takes."""


def pullback(backend: str, dy: jax.Array, operands: Operands) -> Operands:
    """The cotangents of the `directions` of `moved` that are asked for, of dy [T, H]."""
    settings = operands["settings"]
    directions = operands["directions"]
    asked = {name for name, direction in directions.items() if is_asked_for(direction)}
    dy = dy.astype(settings.dtype)
    sums = _Sums(backend, operands["plan"], settings)
    if asked == {"down"}:
        h, _ = activated(backend, operands["pre"], operands)
        assert h is not None, "it was asked for"
        of_down = sums.gradient(sums.of_rows(h), sums.of_tokens(dy), operands["down"], directions["down"])
        return {"directions": {"down": of_down}}
    rounds_to = settings.gradients_round_to
    drows, in_8_bits = dispatched(backend, x=dy, plan=operands["plan"]), None
    if rounds_to is not None:
        of_tokens = rows_in_8_bits(dy, rounds_to, scaling=SCALING, backend=backend)
        in_8_bits = dispatched(backend, x=of_tokens, plan=operands["plan"])
    dh = _of_rows(backend, drows, in_8_bits, operands["down"], operands)
    of_activation = _through_activation(backend, dh, operands, asked, sums)
    found = {}
    if "row_weights" in asked:
        found["row_weights"] = of_activation.row_weights
    if "down" in asked:
        found["down"] = sums.gradient(of_activation.result, sums.of_tokens(dy), operands["down"], directions["down"])
    if "gate_up" in asked:
        found["gate_up"] = sums.gradient(
            sums.of_x(operands), of_activation.factor, operands["gate_up"], directions["gate_up"]
        )
    if "gate_up_bias" in asked:
        found["gate_up_bias"] = sums.of_bias(of_activation.array, directions["gate_up_bias"].aval)
    if "x" in asked:
        dx = _of_rows(backend, of_activation.array, of_activation.in_8_bits, operands["gate_up"], operands)
        found["x"] = summed(backend, [dx], operands["plan"], directions["x"].aval.dtype)
    return {"directions": found}


class _OfActivation(NamedTuple):
    """What the pullback of the activation gives; None for what is not asked for.

    Attributes:
      array: the cotangent of pre-activations.
      in_8_bits: the same for a product.
      factor: the same for a gradient of weights.
      result: the activated rows for one.
      row_weights: the cotangent of the rows' weights.
    """

    array: Any
    in_8_bits: Any
    factor: Any
    result: Any
    row_weights: Any


def _through_activation(
    backend: str, dh: jax.Array, operands: Operands, asked: set[str], sums: "_Sums"
) -> _OfActivation:
    settings = operands["settings"]
    rounds_to = settings.gradients_round_to
    common = {
        "h": operands["pre"],
        "dout": dh,
        "row_weights": operands["row_weights"],
        "activation": settings.activation,
        "limit": settings.limit,
        "with_weights": "row_weights" in asked,
        "result_in_8_bits": settings.rounds_to,
    }
    of_pre = asked & {"x", "gate_up", "gate_up_bias"}
    in_8_bits_alone = rounds_to is not None and rounds_to == settings.weights_gradients_round_to
    if in_8_bits_alone and asked & {"gate_up", "down"} and "gate_up_bias" not in asked:
        in_8_bits, factor, result, drow_weights = activation.pulled_with_columns(
            backend, **common, group_sizes=operands["plan"].group_sizes, in_8_bits=rounds_to
        )
        return _OfActivation(None, in_8_bits, factor, result, drow_weights)
    array, in_8_bits, drow_weights, result = activation.pulled(
        backend,
        **common,
        with_array=bool(of_pre),
        in_8_bits=rounds_to if "x" in asked else None,
        with_result=settings.dtype if "down" in asked else None,
    )
    factor = sums.of_rows(array, are_cotangents=True) if "gate_up" in asked else None
    return _OfActivation(array, in_8_bits, factor, None if result is None else sums.of_rows(result), drow_weights)


def _of_rows(
    backend: str, drows: jax.Array | None, in_8_bits: QTensor | None, weights: Operands, operands: Operands
) -> jax.Array:
    """The cotangent of the rows of a product, from that of its result, which may be rounded."""
    settings, of_experts = operands["settings"], groups(operands["plan"])
    of_product = weights | of_experts | {"quantization": settings.quantization}
    return product(
        backend,
        **for_dlhs(backend, drows, in_8_bits, of_product),
        **of_experts,
        bias=None,
        quantization=None,
        out_dtype=settings.dtype,
    )


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Gradients of weights: sums over the rows of each expert, of arrays or, if `settings` say so, in 8 bits."""

    backend: str
    plan: Plan
    settings: Settings

    def gradient(self, rows: Factor, drows: Factor, weights: Operands, direction: Any) -> jax.Array | None:
        """That of the weights of a product of `rows`, which `direction` asks for; None if it went to a ref.

        Where weights are cast, it is rounded to the dtype of the cast ones, as the derivative of a cast is; what is
        added to a ref is not.
        """
        left, right = (drows, rows) if weights["face_transposed"] else (rows, drows)
        like = direction.aval

        def cotangent(onto: jax.Array | None) -> jax.Array:
            if onto is not None:
                return self._gradient(left, right, like.shape[0], like.dtype, as_matrices(onto)).reshape(like.shape)
            dtype = like.dtype if self.settings.weights_dtype is None else self.settings.weights_dtype
            return self._gradient(left, right, like.shape[0], dtype).reshape(like.shape).astype(like.dtype)

        return accumulate(direction, cotangent)

    def _gradient(
        self, left: Factor, right: Factor, num_experts: int, dtype: jnp.dtype, onto: jax.Array | None = None
    ) -> jax.Array:
        if isinstance(left, Columns) and isinstance(right, Columns):
            options: Any = {"preferred_element_type": dtype, "onto": onto, "backend": self.backend}
            return grouped_matmul_of_columns(left, right, self.plan.group_sizes, **options)
        assert isinstance(left, jax.Array), "both are, or none is"
        assert isinstance(right, jax.Array), "both are, or none is"
        return self._correlated(left, right, num_experts, dtype, onto)

    def of_bias(self, drows: jax.Array, like: jax.core.ShapedArray) -> jax.Array:
        """That of the bias of a product."""
        ones = jnp.ones((drows.shape[0], 1), self.settings.dtype)
        return self._correlated(ones, drows, like.shape[0], like.dtype)[:, 0]

    def of_tokens(self, dy: jax.Array) -> Factor:
        """Cotangents of tokens [T, H] as a factor."""
        if (dtype := self.settings.weights_gradients_round_to) is None:
            return dispatched(self.backend, x=dy, plan=self.plan)
        return self._columns(dy, dtype, gathered=True)

    def of_x(self, operands: Operands) -> Factor:
        """Tokens as a factor."""
        x, in_8_bits, settings = operands["x"], operands["x_in_8_bits"], self.settings
        if settings.weights_gradients_round_to is None:
            return tokens_again(self.backend, operands)
        x = dequantize(in_8_bits, settings.dtype) if x is None else x
        return self._columns(x, settings.rounds_to, gathered=True)

    def of_rows(self, rows: jax.Array, *, are_cotangents: bool = False) -> Factor:
        """Rows as a factor."""
        settings = self.settings
        if settings.weights_gradients_round_to is None:
            return rows
        return self._columns(rows, settings.weights_gradients_round_to if are_cotangents else settings.rounds_to)

    def _columns(self, x: jax.Array, dtype: jnp.dtype | None, *, gathered: bool = False) -> Columns:
        tokens = self.plan.order // self.plan.inverse.shape[1] if gathered else None
        name: Any = jnp.dtype(dtype).name
        return quantize_columns(x, self.plan.group_sizes, row_ids=tokens, dtype=name, backend=self.backend)

    def _correlated(
        self, lhs: jax.Array, dout: jax.Array, num_experts: int, dtype: jnp.dtype, onto: jax.Array | None = None
    ) -> jax.Array:
        return correlated(
            self.backend,
            lhs=lhs,
            lhs_face=None,
            dout=dout,
            dout_face=None,
            **groups(self.plan),
            num_groups=num_experts,
            onto=onto,
            out_dtype=dtype,
        )

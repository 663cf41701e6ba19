"""The gated MLP that applies some experts to rows sorted by expert: two kernels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.params import flat_array, flat_halves, flat_layouts
from pallas_kernels.activations import Activation
from pallas_kernels.grouped_matmul import (
    grouped_gate_up,
    grouped_gate_up_in_8_bits,
    grouped_gate_up_rounded,
    grouped_matmul,
    result_can_stay,
)
from pallas_kernels.grouped_matmul.weights import cast
from pallas_kernels.quantize import Copied, Operand, QTensor, Quantization, Rows, ToRound, Weights, is_of_one_row
from pallas_kernels.quantize_rows import SCALING, rounded
from pallas_kernels.routed_mlp import pays, routed_mlp
from pallas_kernels.tracing.unless_differentiated import unless_differentiated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The parameters of L experts; `as_multiplied` is what products take.

    Attributes:
      gate_up: [L, H, 2, I], or that as [L, H, 2I], gate first, or [L, 2I, H]; layouts in 8 bits are of the last two.
      down: [L, I, H] or [L, H, I].
      gate_up_bias: [L, 2I] or None.
      down_bias: [L, H] or None.
      k_major: whether gate_up, and down, are the last of these.
      dtype: what arrays are cast to before they are multiplied; None for as they come.
    """

    gate_up: Weights
    down: Weights
    gate_up_bias: jax.Array | None
    down_bias: jax.Array | None
    k_major: tuple[bool, bool] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype | None = dataclasses.field(default=None, metadata={"static": True})

    def as_multiplied(self) -> "ExpertWeights":
        """With gate and up as one matrix, in `dtype`."""
        gate_up = self.gate_up if len(self.gate_up.shape) == 3 else flat_array(self.gate_up)
        gate_up, down = cast(gate_up, self.dtype), cast(self.down, self.dtype)
        return dataclasses.replace(self, gate_up=gate_up, down=down, dtype=None)


@dataclasses.dataclass(frozen=True)
class ExpertMath:
    """down(act(gate(row)) · up(row)) with the weights of each row's expert, in either layout of the weights.

    Attributes:
      activation: of the gate.
      activation_limit: the clamp before it, or None.
      quantization: how operands that are not QTensors are rounded to 8 bits; None multiplies them as they are.
      dtype: of the result.
      backend: of the kernels.
      stays_in_8_bits: has rows that are rounded to 8 bits be nothing else. No gradient passes then.
      trains: has the experts of one chip take a backward pass of their own, see `pallas_kernels.trained_mlp`.
    """

    activation: Activation
    activation_limit: float | None
    quantization: Quantization | None
    dtype: jax.typing.DTypeLike
    backend: str
    stays_in_8_bits: bool = False
    trains: bool = False

    def __call__(self, rows: Rows, group_sizes: jax.Array, weights: ExpertWeights) -> jax.Array:
        """Both kernels.

        Args:
          rows: [R, H], sorted by expert; a QTensor takes no gradient.
          group_sizes: int32 [L], rows of each of the L experts whose weights are given.
          weights: of these, `as_multiplied`.

        Returns:
          [R, H] in `dtype`; zeros past the sum of group_sizes.
        """
        k_major = weights.k_major
        h = self.gate_up(rows, group_sizes, weights.gate_up, k_major=k_major[0], bias=weights.gate_up_bias)
        return self.down(h, group_sizes, weights.down, k_major=k_major[1], bias=weights.down_bias)

    def rounded(self, x: jax.Array, *, late: bool = False) -> Copied:
        """Tokens x [T, H] as they are copied to experts: rounded before that, if each row has scales of its own.

        Where nobody else takes them, and `late` is set, that is left to who copies them.
        """
        quantization = self.quantization
        if quantization is None or not is_of_one_row(quantization.lhs_scaling):
            return x
        if late and self.stays_in_8_bits and quantization.lhs_scaling == SCALING:
            return ToRound(x, quantization.dtype)
        found = rounded(x, quantization.dtype, scaling=quantization.lhs_scaling, backend=self.backend)
        return found.in_8_bits if self.stays_in_8_bits else found

    def serve_or_train[Result](self, run: Callable[..., Result], *operands: Any) -> Result:
        """run(math, *operands): rows stay in 8 bits where no gradient is asked for, and `trains` is set where one is.

        `run` must not close over traced values.
        """
        serve = dataclasses.replace(self, stays_in_8_bits=self.quantization is not None)
        train = dataclasses.replace(self, trains=True)
        return unless_differentiated(functools.partial(run, serve), functools.partial(run, train), *operands)

    def gate_up(
        self,
        rows: Rows,
        group_sizes: jax.Array,
        weights: Weights,
        *,
        k_major: bool,
        bias: jax.Array | None = None,
    ) -> Rows:
        """Kernel one: rows [R, H] -> [R, I], in 8 bits as kernel two takes it, or in float32 if that will round it."""
        quantization, width = self.quantization, weights.shape[1 if k_major else 2] // 2
        settings: dict[str, Any] = {
            "bias": bias,
            "activation": self.activation,
            "activation_limit": self.activation_limit,
            "transpose_rhs": k_major,
            "quantization": quantization,
            "backend": self.backend,
        }
        if self.stays_in_8_bits and quantization is not None and result_can_stay(quantization, width):
            return grouped_gate_up_in_8_bits(rows, weights, group_sizes, dtype=quantization.dtype, **settings)
        if quantization is not None and not result_can_stay(quantization, width):
            # Rounding to BF16 first and then to 8 bits would give another value in one case out of thirty.
            return grouped_gate_up(rows, weights, group_sizes, preferred_element_type=jnp.float32, **settings)
        settings["preferred_element_type"] = self.dtype
        if quantization is not None:
            return grouped_gate_up_rounded(rows, weights, group_sizes, dtype=quantization.dtype, **settings)
        return grouped_gate_up(rows, weights, group_sizes, **settings)

    def down(
        self, h: Rows, group_sizes: jax.Array, weights: Weights, *, k_major: bool, bias: jax.Array | None = None
    ) -> jax.Array:
        """Kernel two: h [R, I] -> [R, H] in `dtype`."""
        return grouped_matmul(
            h,
            weights,
            group_sizes,
            bias=bias,
            preferred_element_type=self.dtype,
            transpose_rhs=k_major,
            quantization=self.quantization,
            backend=self.backend,
        )

    def few_tokens(
        self,
        x: Copied,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        gate_up: Operand,
        down: Operand,
        *,
        biases: tuple[jax.Array | None, jax.Array | None],
        residual: jax.Array | None = None,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array | None:
        """The weighted sum of the chosen experts in one kernel; None where that does not pay, see `routed_mlp.pays`.

        Args:
          x: [T, H], as `rounded` has it.
          topk_weights: float32 [T, K].
          topk_ids: int32 [T, K], −1 for no choice.
          gate_up: [E, 2I, H], gate first: of all experts.
          down: [E, H, I].
          biases: [E, 2I] and [E, H], or None.
          residual: [T, H], what the sum is added to, or None.
          preferred_element_type: of the result [T, H].
        """
        if not (isinstance(x, QTensor | ToRound) and isinstance(gate_up, QTensor) and isinstance(down, QTensor)):
            return None
        if self.backend == "xla" or not pays(x, topk_ids, gate_up, down):
            return None
        return routed_mlp(
            x,
            topk_weights,
            topk_ids,
            gate_up,
            down,
            gate_up_bias=biases[0],
            down_bias=biases[1],
            residual=residual,
            activation=self.activation,
            activation_limit=self.activation_limit,
            out_dtype=preferred_element_type,
            backend=self.backend,
        )


def math_of(config: MoEConfig) -> ExpertMath:
    """The `ExpertMath` of the routed experts of a layer."""
    quantization = config.quantization if config.precision == "w8a8" else None
    return ExpertMath(config.activation, config.activation_limit, quantization, config.dtype, config.backend)


def expert_mlp(
    rows: Rows,
    group_sizes: jax.Array,
    gate_up: Weights,
    down: Weights,
    math: ExpertMath,
    *,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
) -> jax.Array:
    """`math` on parameters as `MoEParams` holds them.

    Args:
      rows: [R, H], sorted by expert; a QTensor takes no gradient.
      group_sizes: int32 [L], rows of each of the L experts whose weights are given.
      gate_up: [L, H, 2, I], or a QTensor [L, 2, I, H].
      down: [L, I, H], or a QTensor [L, H, I].
      math: of the experts.
      gate_up_bias: [L, 2, I] or None.
      down_bias: [L, H] or None.

    Returns:
      [R, H] in math.dtype; zeros past the sum of group_sizes.
    """
    params = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    return math(rows, group_sizes, expert_weights(params, math).as_multiplied())


def expert_weights(params: dict[str, Any], math: ExpertMath) -> ExpertWeights:
    """The `EXPERT_FIELDS` of MoEParams by name: arrays stay as they are, so that gradients are those of parameters."""
    gate_up, down = params["gate_up"], params["down"]
    return ExpertWeights(
        flat_layouts(gate_up),
        down,
        _flat_bias(params["gate_up_bias"]),
        params["down_bias"],
        (isinstance(gate_up, QTensor), isinstance(down, QTensor)),
        _dtype_of_weights(math),
    )


def gate_up_projection(
    rows: Rows,
    group_sizes: jax.Array,
    gate_up: Weights,
    math: ExpertMath,
    *,
    bias: jax.Array | None = None,
) -> Rows:
    """Kernel one of `expert_mlp` alone: rows [R, H] -> [R, I]."""
    weights = flat_halves(cast(gate_up, _dtype_of_weights(math)))
    return math.gate_up(rows, group_sizes, weights, k_major=isinstance(gate_up, QTensor), bias=_flat_bias(bias))


def down_projection(
    h: Rows, group_sizes: jax.Array, down: Weights, math: ExpertMath, *, bias: jax.Array | None = None
) -> jax.Array:
    """Kernel two of `expert_mlp` alone: h [R, I] -> [R, H]."""
    weights = cast(down, _dtype_of_weights(math))
    return math.down(h, group_sizes, weights, k_major=isinstance(down, QTensor), bias=bias)


def few_tokens(
    x: Copied,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: dict[str, Any],
    math: ExpertMath,
    *,
    residual: jax.Array | None = None,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array | None:
    """`ExpertMath.few_tokens` on the `EXPERT_FIELDS` of MoEParams by name."""
    return math.few_tokens(
        x,
        topk_weights,
        topk_ids,
        flat_halves(params["gate_up"]),
        params["down"],
        biases=(_flat_bias(params["gate_up_bias"]), params["down_bias"]),
        residual=residual,
        preferred_element_type=preferred_element_type,
    )


def shared_mlp(x: jax.Array, gate_up: Weights, down: Weights, math: ExpertMath, config: MoEConfig) -> jax.Array:
    """The shared expert on every token, as a group of one: x [T, H], gate_up [H, 2, S], down [S, H] -> [T, H].

    `math` is that of the routed experts; the shared one has an activation of its own.
    """
    activation, limit = config.of_shared_expert
    gate_up, down = jax.tree.map(lambda leaf: leaf[None], (gate_up, down))
    own = dataclasses.replace(math, activation=activation, activation_limit=limit)
    return expert_mlp(x, jnp.array([x.shape[0]], jnp.int32), gate_up, down, own)


def _flat_bias(bias: jax.Array | None) -> jax.Array | None:
    """[L, 2, I] -> [L, 2I]."""
    return None if bias is None else bias.reshape(bias.shape[0], -1)


def _dtype_of_weights(math: ExpertMath) -> jnp.dtype | None:
    """That of `math`, unless weights will be in 8 bits: they are rounded as they come.

    Over an FSDP axis they were cast or rounded earlier, before they were gathered.
    """
    return jnp.dtype(math.dtype) if math.quantization is None else None

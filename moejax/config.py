"""What a Mixture-of-Experts layer is: sizes, routing, precision, losses. Checked once, when it is made."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.backend import check_backend
from pallas_kernels.quantize import Quantization, Scaling, block_shape, scale_shape

Scoring = Literal["softmax", "sigmoid"]
Precision = Literal["w16a16", "w8a8"]

PRECISIONS: Mapping[str, str] = MappingProxyType(
    {
        "w16a16": "weights, dispatch and combine in the layer's dtype (BF16, or float32)",
        "w8a8": "8-bit weights and activations, FP8 dispatch, BF16 combine",
    }
)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The sizes and rules of one Mixture-of-Experts layer.

    Attributes:
      hidden_size: H, width of a token.
      intermediate_size: I, width of one routed expert.
      num_experts: E.
      top_k: K, experts per token.
      shared_intermediate_size: width of the shared expert that every token passes (all of them together), 0 for none.
      activation: silu, gelu, gelu_tanh or swigluoai.
      activation_limit: clamp of gate and up before the activation, or None.
      expert_bias: whether experts have biases.
      scoring: "softmax" over all experts, or "sigmoid" of each.
      normalize_topk: scale the K weights of a token to sum 1.
      routed_scaling_factor: the weights are multiplied by this after all else.
      num_groups: groups that the experts are divided into for group-limited routing (1: no limit).
      topk_groups: groups a token may pick experts from, ranked by the sum of their two best scores.
      router_bias: whether the router's projection has a bias.
      correction_bias: whether a bias, which no gradient trains, is added to the scores for choosing experts but not
        for weighting them (DeepSeek-V3's balancing without a loss).
      scale_inputs: multiply the weight into the expert's input instead of its output (Llama 4; K = 1).
      precision: "w16a16" or "w8a8"; see `PRECISIONS`.
      quantization: dtypes and scalings of "w8a8".
      wire_scaling: scaling of the FP8 rows that "w8a8" sends between chips.
      capacity_factor: None drops nothing. A number bounds what an expert takes of a chip's tokens to
        ⌈capacity_factor · T·K / E⌉; what is dropped is counted and returned.
      load_balance_loss: weight of the Switch load-balance loss.
      sequence_balance_loss: weight of DeepSeek-V3's loss per sequence.
      z_loss: weight of the router z-loss.
      dtype: of the computation: bfloat16, float16 or float32.
      param_dtype: of the parameters.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Raises:
      ValueError: on construction, when a field or a combination of fields makes no sense.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int = 0
    activation: Activation = "silu"
    activation_limit: float | None = None
    expert_bias: bool = False
    scoring: Scoring = "softmax"
    normalize_topk: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    router_bias: bool = False
    correction_bias: bool = False
    scale_inputs: bool = False
    precision: Precision = "w16a16"
    quantization: Quantization = dataclasses.field(default_factory=Quantization)
    wire_scaling: Scaling = "1x128"
    capacity_factor: float | None = None
    load_balance_loss: float = 0.0
    sequence_balance_loss: float = 0.0
    z_loss: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    param_dtype: jax.typing.DTypeLike = jnp.float32
    backend: str = "auto"

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k", "num_groups", "topk_groups"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("shared_intermediate_size", "load_balance_loss", "sequence_balance_loss", "z_loss"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(self.top_k <= self.num_experts, "top_k", f"at most num_experts={self.num_experts}", self.top_k)
        _require(
            self.num_experts % self.num_groups == 0,
            "num_groups",
            f"a divisor of num_experts={self.num_experts}",
            self.num_groups,
        )
        _require(
            self.topk_groups <= self.num_groups,
            "topk_groups",
            f"at most num_groups={self.num_groups}",
            self.topk_groups,
        )
        reachable = self.topk_groups * (self.num_experts // self.num_groups)
        _require(
            self.top_k <= reachable,
            "top_k",
            f"at most the {reachable} experts of topk_groups={self.topk_groups} groups",
            self.top_k,
        )
        _require(self.scoring in ("softmax", "sigmoid"), "scoring", "'softmax' or 'sigmoid'", self.scoring)
        _require(self.precision in PRECISIONS, "precision", " or ".join(map(repr, PRECISIONS)), self.precision)
        _require(
            self.capacity_factor is None or self.capacity_factor > 0,
            "capacity_factor",
            "positive, or None to drop nothing",
            self.capacity_factor,
        )
        _require(not self.scale_inputs or self.top_k == 1, "top_k", "1 with scale_inputs=True", self.top_k)
        _require(
            block_shape(self.wire_scaling)[0] == 1,
            "wire_scaling",
            "of one row, such as '1x128' or 'per_row' (rows travel with their own scales)",
            self.wire_scaling,
        )
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name)).name
            _require(dtype in ("bfloat16", "float16", "float32"), name, "bfloat16, float16 or float32", dtype)
        check_activation(self.activation, self.activation_limit)
        check_backend(self.backend)
        if self.precision == "w8a8":
            self._check_scale_blocks()

    def _check_scale_blocks(self):
        """Each operand of each product must divide into the blocks of its scaling."""
        q, hidden = self.quantization, self.hidden_size
        operands = [("hidden_size", (1, hidden), self.wire_scaling), ("hidden_size", (1, hidden), q.lhs_scaling)]
        for name in ("intermediate_size", "shared_intermediate_size"):
            if width := getattr(self, name):
                operands += [
                    (name, (1, width), q.lhs_scaling),
                    (name, (hidden, 2 * width), q.rhs_scaling),
                    (name, (width, hidden), q.rhs_scaling),
                ]
        for name, shape, scaling in operands:
            try:
                scale_shape(shape, scaling)
            except ValueError as reason:
                raise ValueError(f"precision 'w8a8' does not fit {name}={getattr(self, name)}: {reason}") from None


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")

"""What a Mixture-of-Experts layer is: sizes, router, precision. Checked once, when it is made."""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from moejax.checks import check_float_dtype, require, require_integer
from moejax.routers.base import Router
from moejax.routers.top_k import TopKRouter
from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.backend import check_backend
from pallas_kernels.quantize import QDtype, Quantization, Scaling, is_of_one_row, scale_shape
from sharding.exchange import check_transport
from sharding.exchange.capacity import Scope

Precision = Literal["w16a16", "w8a8"]

PRECISIONS: Mapping[str, str] = MappingProxyType(
    {
        "w16a16": "weights, dispatch and combine in the layer's dtype (BF16, or float32)",
        "w8a8": "8-bit weights and activations, 8-bit dispatch, BF16 combine",
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
      shared_intermediate_size: width of the shared expert, which sees every token (of several, the sum); 0 for none.
      router: which experts a token goes to, how they are weighted, and the losses that keep them balanced; one of
        `moejax.routers`.
      activation: silu, gelu, gelu_tanh, relu2 or swigluoai.
      activation_limit: clamp of gate and up before the activation, or None.
      shared_activation: that of the shared expert; None for `activation` with its limit.
      shared_activation_limit: its clamp, where `shared_activation` is given.
      shared_gate: whether the shared expert's output is scaled by the sigmoid of a learnt map of the token (Qwen2-MoE).
      expert_bias: whether experts have biases.
      scale_inputs: multiply the weight into the expert's input instead of its output (Llama 4; K = 1).
      precision: "w16a16" or "w8a8"; see `PRECISIONS`.
      quantization: dtypes and scalings of "w8a8".
      wire_scaling: scaling of the 8-bit rows that "w8a8" sends between chips, in the dtype of `quantization`, where
        `quantization.lhs_scaling` is not of one row. Where it is, rows travel as they are multiplied.
      wire_gradient_dtype: 8-bit dtype in which gradients of rows travel between chips, such as float8_e5m2, each row
        with a scale; None sends them in the dtype that they have.
      capacity_factor: None drops nothing. A number, to a thousandth, bounds what an expert takes of T tokens to
        ⌈capacity_factor · T·K / E⌉; what is dropped is counted and returned.
      capacity_of: which T tokens a capacity refers to: those of the whole "batch", so that the same choices are dropped
        on every mesh, or those of each "chip", so that chips need not tell each other what they chose.
      dtype: the dtype to compute in: bfloat16, float16 or float32.
      param_dtype: of the parameters.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".
      transport: what carries rows between chips: a name in `sharding.exchange.pick.TRANSPORTS`, or "auto" for the one
        that `sharding.exchange.pick` takes by itself. "hierarchical" takes experts that are split over two axes, nodes
        first: Partition(expert=("node", "local")).

    Raises:
      ValueError: on construction, when a field or a combination of fields makes no sense.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int = 0
    router: Router = dataclasses.field(default_factory=TopKRouter)
    activation: Activation = "silu"
    activation_limit: float | None = None
    shared_activation: Activation | None = None
    shared_activation_limit: float | None = None
    shared_gate: bool = False
    expert_bias: bool = False
    scale_inputs: bool = False
    precision: Precision = "w16a16"
    quantization: Quantization = dataclasses.field(default_factory=Quantization)
    wire_scaling: Scaling = "1x128"
    wire_gradient_dtype: QDtype | None = None
    capacity_factor: float | None = None
    capacity_of: Scope = "batch"
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    param_dtype: jax.typing.DTypeLike = jnp.float32
    backend: str = "auto"
    transport: str = "auto"

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            require_integer(name, getattr(self, name), at_least=1)
        require_integer("shared_intermediate_size", self.shared_intermediate_size, at_least=0)
        require(self.top_k <= self.num_experts, "top_k", f"at most num_experts={self.num_experts}", self.top_k)
        wanted = (
            "a router of moejax.routers, such as TopKRouter(); an entry of ROUTERS takes a config and makes one of it"
        )
        require(isinstance(self.router, Router), "router", wanted, self.router)
        self.router.check(self.num_experts, self.top_k)
        require(self.precision in PRECISIONS, "precision", " or ".join(map(repr, PRECISIONS)), self.precision)
        require(isinstance(self.quantization, Quantization), "quantization", "a Quantization", self.quantization)
        in_8_bits = self.quantization.gradient_dtype or self.quantization.weights_gradient_dtype
        needed = "'w8a8' where quantization has a dtype of gradients"
        require(in_8_bits is None or self.precision == "w8a8", "precision", needed, self.precision)
        if self.capacity_factor is not None:
            is_number = isinstance(self.capacity_factor, numbers.Real) and not isinstance(self.capacity_factor, bool)
            is_fit = is_number and 0 < self.capacity_factor < math.inf
            require(is_fit, "capacity_factor", "positive and finite, or None to drop nothing", self.capacity_factor)
        require(self.capacity_of in ("batch", "chip"), "capacity_of", "'batch' or 'chip'", self.capacity_of)
        require(not self.scale_inputs or self.top_k == 1, "top_k", "1 with scale_inputs=True", self.top_k)
        try:
            travels = is_of_one_row(self.wire_scaling)
        except ValueError:
            travels = False
        of_one_row = "of one row, such as '1x128' or 'per_row' (rows travel with their own scales)"
        require(travels, "wire_scaling", of_one_row, self.wire_scaling)
        with contextlib.suppress(TypeError):
            if self.wire_gradient_dtype is not None:
                object.__setattr__(self, "wire_gradient_dtype", jnp.dtype(self.wire_gradient_dtype).name)
        known = (None, *get_args(QDtype))
        require(self.wire_gradient_dtype in known, "wire_gradient_dtype", f"one of {known}", self.wire_gradient_dtype)
        for name in ("dtype", "param_dtype"):
            check_float_dtype(name, getattr(self, name))
        for name in ("shared_gate", "expert_bias", "scale_inputs"):
            require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        check_activation(self.activation, self.activation_limit)
        self._check_shared_expert()
        check_backend(self.backend)
        check_transport(self.transport)
        self.router.check_layer(self)
        if self.precision == "w8a8":
            self.check_scale_blocks()

    @property
    def of_shared_expert(self) -> tuple[Activation, float | None]:
        """Activation and clamp of the shared expert."""
        if self.shared_activation is None:
            return self.activation, self.activation_limit
        return self.shared_activation, self.shared_activation_limit

    def _check_shared_expert(self):
        if self.shared_activation is None:
            require(
                self.shared_activation_limit is None,
                "shared_activation_limit",
                "None where shared_activation is not given",
                self.shared_activation_limit,
            )
        else:
            check_activation(self.shared_activation, self.shared_activation_limit, name="shared_activation")
        require(
            not self.shared_gate or self.shared_intermediate_size > 0,
            "shared_gate",
            "False where there is no shared expert",
            self.shared_gate,
        )

    @property
    def scaling_of_rows(self) -> Scaling:
        """Of the 8-bit rows that travel between chips."""
        lhs_scaling = self.quantization.lhs_scaling
        return lhs_scaling if is_of_one_row(lhs_scaling) else self.wire_scaling

    def check_scale_blocks(self, width_parts: int = 1) -> None:
        """Raises ValueError unless each operand, with widths in `width_parts` parts, divides into blocks."""
        q, hidden = self.quantization, self.hidden_size
        of_lhs, of_rhs = "quantization.lhs_scaling", "quantization.rhs_scaling"
        operands = [("hidden_size", (1, hidden), q.lhs_scaling, of_lhs)]
        operands += [("hidden_size", (1, hidden), self.scaling_of_rows, "wire_scaling")]  # if not that of lhs again
        for name in ("intermediate_size", "shared_intermediate_size"):
            if width := getattr(self, name) // width_parts:
                operands += [
                    (name, (1, width), q.lhs_scaling, of_lhs),
                    (name, (hidden, width), q.rhs_scaling, of_rhs),
                    (name, (width, hidden), q.rhs_scaling, of_rhs),
                ]
        for name, shape, scaling, setting in operands:
            try:
                scale_shape(shape, scaling)
            except ValueError as reason:
                in_parts = f" in {width_parts} parts" if width_parts > 1 and name != "hidden_size" else ""
                size = f"{name}={getattr(self, name)}{in_parts}"
                where = f"in {setting}, or another size"
                raise ValueError(f"precision 'w8a8' does not fit {size}: {reason} {where}") from None

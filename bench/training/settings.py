"""What training compares, routers and precisions, and what all runs have in common: sizes, budget, what is counted."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.training.transformer import Transformer
from moejax import MoEConfig, Quantization
from moejax.params import EXPERT_FIELDS
from moejax.routers import ROUTERS

BASELINE_PRECISION = "w16a16"
BASELINE_ROUTER = "softmax"

PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    BASELINE_PRECISION: {},
    "w8a8": {"precision": "w8a8"},
    "w8a8g8": {
        "precision": "w8a8",
        "quantization": Quantization(gradient_dtype="float8_e4m3fn", weights_gradient_dtype="float8_e4m3fn"),
    },
}
"""Fields of `MoEConfig` by the name of a precision.

The experts' products are in the dtype of the run; in FP8 forward; or in FP8 all of them, those of both gradients too.
"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What one run has and another may not: a router in a precision.

    Attributes:
      router: its name in `ROUTERS`.
      precision: its name in `PRECISIONS`.
    """

    router: str
    precision: str = BASELINE_PRECISION

    @property
    def name(self) -> str:
        """The router's, with the precision if that is not the usual one: softmax, softmax-w8a8."""
        return self.router if self.precision == BASELINE_PRECISION else f"{self.router}-{self.precision}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common; sizes as in `MoEConfig`.

    Attributes:
      num_layers: blocks of attention and experts.
      num_heads: of the attention.
      batch_size: sequences in a step.
      length: bytes of a sequence.
      steps: of a run, so that every run sees steps · batch_size · length tokens.
      learning_rate: its peak.
      evaluations: looks at the held-out text, evenly spaced, after the one before the first step.
      looks: further steps after which to look.
      held_out_batches: batches that each looks at.
      capacity_factor: of experts; None for what each router does by default, mostly to drop nothing.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_layers: int
    num_heads: int
    batch_size: int
    length: int
    steps: int
    learning_rate: float
    dtype: str
    backend: str = "auto"
    capacity_factor: float | None = None
    evaluations: int = 10
    looks: tuple[int, ...] = ()
    held_out_batches: int = 8

    @property
    def log_every(self) -> int:
        """Steps of a record: at most fifty records a run."""
        return -(-self.steps // 50)

    @property
    def evaluate_every(self) -> int:
        """Steps from one look at the held-out text to the next."""
        return -(-self.steps // self.evaluations)

    def looks_after(self, step: int) -> bool:
        """Whether to look at the held-out text when so many steps are done."""
        return step % self.evaluate_every == 0 or step in self.looks or step == self.steps

    def record(self) -> dict[str, Any]:
        """The fields, as they are in JSON."""
        return {**dataclasses.asdict(self), "looks": list(self.looks)}


def make_model(variant: Variant, settings: Settings, rngs: nnx.Rngs) -> Transformer:
    """The transformer with this router and precision, the losses and their weights those of the router's paper."""
    common = MoEConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        capacity_factor=settings.capacity_factor,
        dtype=jnp.dtype(settings.dtype),
        backend=settings.backend,
        **PRECISIONS[variant.precision],
    )
    own = {}
    if variant.router == "soft_moe":  # as many slots as the others have choices, so that all spend the same on experts
        own["slots_per_expert"] = math.ceil(settings.length * settings.top_k / settings.num_experts)
    return Transformer(ROUTERS[variant.router](common, **own), settings.num_layers, settings.num_heads, rngs=rngs)


def check_models(variants: Sequence[Variant], settings: Settings) -> None:
    """Raises ValueError if one of the transformers cannot be made, before the first of them is trained."""
    for variant in variants:
        try:
            nnx.eval_shape(lambda variant=variant: make_model(variant, settings, nnx.Rngs(0)))
        except ValueError as error:
            raise ValueError(f"{variant.name}: {error}") from error


def count_parameters(params: Any) -> dict[str, int]:
    """Of a model: parameters, all that gradients train, and expert_parameters, those of routed experts among them."""
    sizes = [(path, leaf.size) for path, leaf in jax.tree.leaves_with_path(params)]
    routed = sum(size for path, size in sizes if any(getattr(key, "key", None) in EXPERT_FIELDS for key in path))
    return {"parameters": sum(size for _, size in sizes), "expert_parameters": routed}

"""The routers that training compares, and what they have in common: sizes, budget, and what is counted of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.training.transformer import Transformer
from moejax import MoEConfig
from moejax.params import EXPERT_FIELDS
from moejax.routers import ROUTERS


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
      evaluations: looks at the held-out text, after the one before the first step.
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
    held_out_batches: int = 8

    @property
    def log_every(self) -> int:
        """Steps of a record: at most fifty records a run."""
        return -(-self.steps // 50)

    @property
    def evaluate_every(self) -> int:
        """Steps from one look at the held-out text to the next."""
        return -(-self.steps // self.evaluations)


def make_model(name: str, settings: Settings, rngs: nnx.Rngs) -> Transformer:
    """The transformer with this router, the losses and their weights those of its paper."""
    common = MoEConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        capacity_factor=settings.capacity_factor,
        dtype=jnp.dtype(settings.dtype),
        backend=settings.backend,
    )
    own = {}
    if name == "soft_moe":  # as many slots as the others have choices, so that all spend the same on experts
        own["slots_per_expert"] = math.ceil(settings.length * settings.top_k / settings.num_experts)
    return Transformer(ROUTERS[name](common, **own), settings.num_layers, settings.num_heads, rngs=rngs)


def count_parameters(params: Any) -> dict[str, int]:
    """Of a model: parameters, all that gradients train, and expert_parameters, those of routed experts among them."""
    sizes = [(path, leaf.size) for path, leaf in jax.tree.leaves_with_path(params)]
    routed = sum(size for path, size in sizes if any(getattr(key, "key", None) in EXPERT_FIELDS for key in path))
    return {"parameters": sum(size for _, size in sizes), "expert_parameters": routed}

"""Experts that have several slots: which slots hold which expert, and to which of them a choice goes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.plan import make_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replicas:
    """The slots of every expert, all int32. They are data: another arrangement compiles nothing anew.

    Attributes:
      experts: [P] the expert of each slot.
      slots: [P] the slots in the order of their experts.
      first: [E] where the slots of an expert begin in `slots`.
      count: [E] how many it has.
    """

    experts: jax.Array
    slots: jax.Array
    first: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, experts: Any, num_experts: int) -> "Replicas":
        """The arrangement with these experts [P] in its slots, as `sharding.balance.balance` plans them.

        Raises:
          ValueError: `experts` are no numbers of experts, or an expert has no slot.
        """
        experts = np.asarray(experts)
        if experts.ndim != 1 or not np.issubdtype(experts.dtype, np.integer):
            raise ValueError(f"experts must be integers [P], got {experts.dtype}{list(experts.shape)}")
        if ((experts < 0) | (experts >= num_experts)).any():
            raise ValueError(f"experts must be in [0, {num_experts}), got {experts.min()} to {experts.max()}")
        count = np.bincount(experts, minlength=num_experts)
        if not count.all():
            raise ValueError(f"every expert needs a slot, and expert {int(count.argmin())} has none")
        slots, first = np.argsort(experts, kind="stable"), np.cumsum(count) - count
        return cls(*(jnp.asarray(values, jnp.int32) for values in (experts, slots, first, count)))

    @property
    def num_slots(self) -> int:
        """P."""
        return self.experts.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.count.shape[0]

    def spread(self, topk_ids: jax.Array, *, turn: jax.Array | int = 0, backend: str = "auto") -> jax.Array:
        """The slot of each choice: the choices of an expert take its slots in turn, in the order of the tokens.

        Args:
          topk_ids: int32 [T, K], experts; outside [0, E) for no choice.
          turn: the slot with which to begin, so that not all chips begin with the same.
          backend: of the sort that counts them.

        Returns:
          int32 [T, K], −1 for no choice.
        """
        plan = make_plan(topk_ids, self.num_experts, backend=backend)
        expert = jnp.clip(topk_ids, 0, self.num_experts - 1)
        place = (plan.inverse - plan.offsets[expert] + turn) % self.count[expert]
        return jnp.where(plan.inverse >= 0, self.slots[self.first[expert] + place], -1)

    def holders(self, experts: jax.Array) -> jax.Array:
        """A slot of each of `experts`, the first."""
        return self.slots[self.first[experts]]

    def add_up(self, gradients: jax.Array) -> jax.Array:
        """Gradients [P, …] of the slots as those of their experts: each replica gets the sum over all of its expert."""
        total = jax.ops.segment_sum(gradients, self.experts, num_segments=self.num_experts)
        return total[self.experts]

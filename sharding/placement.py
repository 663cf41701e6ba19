"""Which chip of an expert-parallel group holds which expert."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Placement:
    """Experts in order: rank r of a group holds the experts [r·L, (r+1)·L), L = E / ep.

    Attributes:
      num_experts: E.
      ep: chips of a group.

    Raises:
      ValueError: `ep` is not positive or does not divide `num_experts`.
    """

    num_experts: int
    ep: int = 1

    def __post_init__(self):
        if self.ep < 1:
            raise ValueError(f"ep must be at least 1, got {self.ep}")
        if self.num_experts % self.ep:
            divisors = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ValueError(
                f"num_experts={self.num_experts} is not divisible by ep={self.ep}; choose ep among "
                f"{', '.join(map(str, divisors))}"
            )

    @property
    def num_local(self) -> int:
        """L, the experts of a chip."""
        return self.num_experts // self.ep

    def rank(self, expert_ids: jax.Array) -> jax.Array:
        """The rank that holds each expert, −1 for −1."""
        return jnp.where(expert_ids >= 0, expert_ids // self.num_local, -1)

    def slot(self, expert_ids: jax.Array) -> jax.Array:
        """The place of each expert among those of its rank; without meaning for −1."""
        return expert_ids % self.num_local

"""Groups of experts, of which a token chooses from the best alone."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Groups:
    """How a choice is limited to groups.

    Attributes:
      num_groups: equal parts of the E experts.
      kept: so many of them, the best, may be chosen from.
      ranked_by: the sum of so many of its best scores is what a group is ranked by.
    """

    num_groups: int
    kept: int
    ranked_by: int

    def check(self, num_experts: int, k: int) -> None:
        """Raises ValueError unless they are equal parts of the experts, and `k` may be chosen from those kept."""
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"num_groups must be a divisor of E = {num_experts}, got {self.num_groups}")
        if not 1 <= self.kept <= self.num_groups:
            raise ValueError(f"kept must be 1 to num_groups = {self.num_groups}, got {self.kept}")
        if self.ranked_by < 1:
            raise ValueError(f"ranked_by must be at least 1, got {self.ranked_by}")
        if k > (reachable := self.kept * (num_experts // self.num_groups)):
            raise ValueError(f"k must be at most the {reachable} experts of kept = {self.kept} groups, got {k}")


def limited_to_groups(ranking: jax.Array, groups: Groups) -> jax.Array:
    """`ranking` [T, E] with the lowest finite number for experts outside each token's best groups; −inf ranks above."""
    num_tokens, num_experts = ranking.shape
    grouped = ranking.reshape(num_tokens, groups.num_groups, num_experts // groups.num_groups)
    best, _ = jax.lax.top_k(grouped, min(groups.ranked_by, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best.sum(-1), groups.kept)
    allowed = (kept[:, :, None] == jnp.arange(groups.num_groups)).any(1)
    lowest = jnp.finfo(ranking.dtype).min
    return jnp.where(allowed[:, :, None], jnp.maximum(grouped, lowest / 2), lowest).reshape(ranking.shape)

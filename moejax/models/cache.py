"""Keys and values of earlier tokens in a fixed number of slots, as a value: every change gives another cache.

cache = KVCache.empty(config, num_slots=8, max_length=4096)
step = jax.jit(..., donate_argnames="cache")        # so that a change takes no second copy
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from moejax.checks import require, require_integer
from moejax.models.config import AttentionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of one attention.

    Attributes:
      keys: [S, M, G, D], turned to their positions; what lies past a slot's length means nothing.
      values: [S, M, G, D].
      lengths: int32 [S], tokens of each slot.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    @classmethod
    def empty(cls, config: AttentionConfig, *, num_slots: int, max_length: int) -> Self:
        """One without tokens.

        Args:
          config: the attention.
          num_slots: S, sequences that are decoded at a time.
          max_length: M, most tokens of a sequence.

        Raises:
          ValueError: a size is not positive.
        """
        if not isinstance(config, AttentionConfig):
            raise TypeError(f"config must be the AttentionConfig of the block, got {type(config).__name__}")
        require_integer("num_slots", num_slots, at_least=1)
        require_integer("max_length", max_length, at_least=1)
        shape = (num_slots, max_length, config.num_key_value_heads, config.head_dim)
        keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
        return cls(keys, values, jnp.zeros(num_slots, jnp.int32))

    @property
    def num_slots(self) -> int:
        """S."""
        return self.keys.shape[0]

    @property
    def max_length(self) -> int:
        """M."""
        return self.keys.shape[1]

    @property
    def is_full(self) -> jax.Array:
        """Bool [S]: slots without room for another token."""
        return self.lengths >= self.max_length

    def started(self, keys: jax.Array, values: jax.Array, slots: jax.Array, lengths: jax.Array) -> Self:
        """With new sequences in some slots, in the place of what was there.

        Args:
          keys: [B, L, G, D].
          values: [B, L, G, D].
          slots: int32 [B], each another one; a sequence whose slot is not in [0, S) is left out.
          lengths: int32 [B], tokens of each, at most L.
        """
        slots = slots.astype(jnp.int32)
        slots = jnp.where(slots >= 0, slots, self.num_slots)  # −1 would be the last one

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            # All of a slot, lest a fault of its last sequence stays in it.
            behind = self.max_length - new.shape[1]
            return old.at[slots].set(jnp.pad(new, ((0, 0), (0, behind), (0, 0), (0, 0))), mode="drop")

        return dataclasses.replace(
            self,
            keys=put(self.keys, keys),
            values=put(self.values, values),
            lengths=self.lengths.at[slots].set(lengths, mode="drop"),
        )

    def appended(self, keys: jax.Array, values: jax.Array, active: jax.Array) -> Self:
        """With one more token in the slots that are active and not full.

        Args:
          keys: [S, G, D].
          values: [S, G, D].
          active: bool [S].
        """
        grows = active & ~self.is_full
        place = jnp.where(grows, self.lengths, self.max_length)  # past the end, for those that stay as they are

        @jax.vmap
        def put(old: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
            return old.at[place].set(new, mode="drop")

        return dataclasses.replace(
            self,
            keys=put(self.keys, keys, place),
            values=put(self.values, values, place),
            lengths=self.lengths + grows.astype(jnp.int32),
        )


def check_cache(cache: KVCache, config: AttentionConfig) -> None:
    """Raises ValueError unless `cache` is one of this attention."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, such as KVCache.empty(config, ...), got {type(cache).__name__}")
    wanted = ("S", "M", config.num_key_value_heads, config.head_dim)
    for name in ("keys", "values"):
        array = getattr(cache, name)
        is_fit = array.shape[2:] == wanted[2:] and array.shape == cache.keys.shape and array.dtype == config.dtype
        require(
            is_fit,
            f"cache.{name}",
            f"{jnp.dtype(config.dtype)}[{', '.join(map(str, wanted))}]",
            f"{array.dtype}{list(array.shape)}",
        )
    got = f"{cache.lengths.dtype}{list(cache.lengths.shape)}"
    require(got == f"int32[{cache.num_slots}]", "cache.lengths", f"int32[{cache.num_slots}]", got)

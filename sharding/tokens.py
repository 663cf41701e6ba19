"""Which tokens of a batch a chip holds, which of them are real, and sums over all of them.

A token's index is its place in the batch, read row by row: the same on every mesh. Positions that are masked, or added
so that a batch can be split, hold no token: they take no expert and no capacity, and count in nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The [T] positions of one chip.

    Attributes:
      index: int32 [T], the place of each in the batch.
      total: positions in the whole batch.
      sequence_length: positions of a sequence.
      axes: mesh axes over which the batch is split; empty on a single chip.
      run: so many positions from the first on, and from each multiple on, are neighbours in the batch too; divides T.
      real: bool [T], false where there is no token; None where all are real.
    """

    index: jax.Array
    total: Any
    sequence_length: Any
    axes: tuple[str, ...] = ()
    run: Any = None
    real: jax.Array | None = None

    @classmethod
    def on_one_chip(cls, num_tokens: Any, sequence_length: Any = 1, real: jax.Array | None = None) -> "Tokens":
        """All tokens of a batch."""
        return cls(jnp.arange(num_tokens, dtype=jnp.int32), num_tokens, sequence_length, real=real)

    @property
    def num_sequences(self) -> Any:
        """Sequences in the whole batch."""
        return self.total // self.sequence_length

    @property
    def count(self) -> Any:
        """Real tokens in the whole batch: a number if all are, else int32 []; never less than 1."""
        if self.real is None:
            return self.total
        return jnp.maximum(self.sum(self.real.sum(dtype=jnp.int32)), 1)

    def sum(self, x: jax.Array) -> jax.Array:
        """Adds `x` over the chips."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def gather(self, x: jax.Array) -> jax.Array:
        """`x` [T, …] of all chips, [chips, T, …], in the order of the axes."""
        return jax.lax.all_gather(x, self.axes) if self.axes else x[None]

    def keep(self, values: jax.Array, otherwise: Any = 0) -> jax.Array:
        """`values` [T, …] of the real tokens, `otherwise` at all other positions."""
        if self.real is None:
            return values
        mask = jnp.expand_dims(self.real, tuple(range(1, values.ndim)))
        return jnp.where(mask, values, jnp.asarray(otherwise, values.dtype))

    def per_sequence(self, values: jax.Array) -> jax.Array:
        """Sums of `values` [T, n] over the real tokens of each sequence: float32 [sequences, n]."""
        # A product with the membership matrix adds in a fixed order; a scatter-add would not on every platform.
        member = self.index // self.sequence_length == jnp.arange(self.num_sequences, dtype=jnp.int32)[:, None]
        values = self.keep(values).astype(jnp.float32)
        return self.sum(jnp.dot(member.astype(jnp.float32), values, precision=jax.lax.Precision.HIGHEST))

"""K rounds of finding the largest number of each row, of rows that a warpgroup holds in its registers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
LOWEST = float(jnp.finfo(jnp.float32).min)

Spread = Callable[[jax.Array, int], jax.Array]
"""How a number of each row becomes a tile of rows of so many columns."""


class Chosen(NamedTuple):
    """What the rounds found, each a number of each row.

    Attributes:
      ids: int32, of each round.
      weights: float32, of each round.
      total: what the weights are to be divided by; None for nothing.
    """

    ids: list[jax.Array]
    weights: list[jax.Array]
    total: Any


class Rounds(NamedTuple):
    """What is asked of the rounds.

    Attributes:
      k: how many there are.
      normalize: whether the weights of a row are divided by their sum.
      softmax: whether the rows are logits, and the weights their softmax.
    """

    k: int
    normalize: bool
    softmax: bool = False

    def __call__(self, remaining: jax.Array, layout: Any, spread: Spread, scores: jax.Array | None = None) -> Chosen:
        """Ids of the K largest of rows, in this layout, and their weights: of `scores`, where these are given."""
        num_experts = remaining.shape[1]
        expert = plgpu.broadcasted_iota(jnp.int32, remaining.shape, 1, layout=layout)
        ids: list[jax.Array] = []
        weights: list[jax.Array] = []
        first = jnp.max(remaining, axis=1)
        of_chosen: Any = 0.0
        of_all: Any = None
        if self.softmax and self.normalize:  # a NaN, which a maximum passes over, or nothing
            of_chosen = jnp.sum(jnp.where(remaining == remaining, 0.0, jnp.nan), axis=1)
        elif self.softmax:
            of_all = jnp.sum(jnp.exp(remaining - spread(first, num_experts)), axis=1)
        remaining = jnp.maximum(remaining, LOWEST)  # what is -inf ranks before what was chosen
        for i in range(self.k):
            best = jnp.max(remaining, axis=1) if i else jnp.maximum(first, LOWEST)
            place, is_chosen = first_place(remaining, best, expert, spread)
            remaining = jnp.where(is_chosen, -jnp.inf, remaining)
            ids.append(place)
            if scores is not None:
                best = jnp.sum(jnp.where(is_chosen, scores, 0.0), axis=1)
            weights.append(jnp.exp(best - first) if self.softmax else best)
            of_chosen = of_chosen + weights[-1]
        if not self.normalize:
            return Chosen(ids, weights, of_all)
        # Those of a softmax are at least 1; of other scores, all that are chosen may underflow.
        return Chosen(ids, weights, of_chosen if self.softmax else jnp.maximum(of_chosen, _SMALLEST))


def first_place(x: jax.Array, best: jax.Array, column: jax.Array, spread: Spread) -> tuple[jax.Array, jax.Array]:
    """The first column of each row in which x is `best`, and whether each number of x is that one."""
    width = x.shape[1]
    place = jnp.min(jnp.where(x == spread(best, width), column, width - 1), axis=1)
    return place, column == spread(place, width)

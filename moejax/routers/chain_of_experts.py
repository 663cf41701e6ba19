"""Chain-of-Experts (Wang et al. 2025, arXiv 2506.18945): several passes through the same experts, one after another.

    x⁰ = x,   xᵖ = xᵖ⁻¹ + Σ_k weight · expert(xᵖ⁻¹),   y = xᴾ        each pass with a router of its own

`ROUTERS["chain_of_experts"]` gives each of P passes ⌈K / P⌉ experts, so that a chain costs what one pass with K does.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moejax.checks import require_integer
from moejax.param import Param
from moejax.routers.base import Experts, Given, Outcome, Params, Router, load_of
from moejax.routers.top_k import TopKRouter
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig


@dataclasses.dataclass(frozen=True)
class ChainRouter(Router):
    """Passes through the same experts, each with a router of its own and a residual around it.

    The input is part of the output (y begins as x). A shared expert works in every pass. Losses are the mean of the
    passes, loads and drops their sum. top_k of the layer is the experts of a token in one pass.

    Attributes:
      passes: how many.
      each: the settings of every pass; a correction bias is moved by the load of all passes together.
    """

    passes: int = 2
    each: TopKRouter = dataclasses.field(default_factory=lambda: TopKRouter(load_balance_loss=0.01))

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        require_integer("passes", self.passes, at_least=1)
        self.each.check(num_experts, top_k)

    def choices(self, top_k: int) -> int:
        """Those of all passes, one after the other."""
        return self.passes * top_k

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """The parameters of `each`, with a dimension for the pass before all others."""

        def stacked(row: Param) -> Param:
            shape, axes = (self.passes, *row.shape), (None, *row.axes)
            return dataclasses.replace(row, shape=shape, axes=axes, stacked=1 + row.stacked)

        return {name: stacked(row) for name, row in self.each.table(config).items()}

    def apply(
        self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given, experts: Experts
    ) -> tuple[jax.Array, Outcome]:
        """See `Router.apply`."""
        state = x.astype(jnp.float32)
        outcomes: list[Outcome] = []
        for number in range(self.passes):
            own = {name: value[number] for name, value in params.items()}
            again = None
            if given.topk_ids is not None:
                again = given.topk_ids[:, number * config.top_k : (number + 1) * config.top_k]
            asked = dataclasses.replace(given, topk_ids=again)
            y, outcome = self.each.apply(state.astype(config.dtype), own, config, tokens, asked, experts)
            state += y.astype(jnp.float32)
            outcomes.append(outcome)
        losses = jax.tree.map(lambda *each: sum(each) / len(each), *(one.losses for one in outcomes))
        ids = jnp.concatenate([one.topk_ids for one in outcomes], axis=1)
        weights = jnp.concatenate([one.topk_weights for one in outcomes], axis=1)
        dropped = _sum(one.load.dropped_per_expert for one in outcomes)
        return state, Outcome(ids, weights, losses, load_of(ids, dropped, config.num_experts, tokens))

    def update(self, params: Params, load: jax.Array) -> dict[str, jax.Array]:
        """Moves the correction biases of all passes alike."""
        return self.each.update(params, load)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    """Their sum, in their dtype, which `sum` would not keep."""
    return functools.reduce(operator.add, arrays)

"""Three ways to lay the rows of experts out for their products, behind one interface.

    padded        [E, C, H]: C = ⌈capacity factor · T·K / E⌉ rows for every expert; what does not fit is dropped and
                  counted; batched matrix products. GShard (arXiv 2006.16668), Switch (arXiv 2101.03961).
    compact       [T·K, H]: rows lie one after the other, groups begin where a prefix sum says; grouped products.
    block_sparse  each group is padded to whole blocks of rows, so that a block has the weights of one expert; grouped
                  products over whole blocks. MegaBlocks (arXiv 2211.15841), section 5.

A `Variant` makes a `Plan` of the router's choice, and multiplies rows that `dispatch` laid out by it. Rows that have no
assignment are zeros, and stay so: the experts have no biases here. Only "padded" drops; the others hold any load.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax import MoEConfig
from moejax.experts import down_projection, gate_up_projection, math_of
from pallas_kernels.activations import gated_halves
from pallas_kernels.plan import Plan, make_plan
from pallas_kernels.quantize import Rows

LAYOUTS = ("compact", "padded", "block_sparse")
OUTSIDE_LAYOUTS = ("top_k", "router")
"""Operators that do not know of layouts."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a case.

    Attributes:
      layout: one of `LAYOUTS`.
      backend: of the operators.
      is_split: whether its stages are timed one by one.
      num_experts: E.
      capacity: rows of an expert in the padded layout; None for the others, which drop nothing.
      block: rows of a block in the block-sparse one.
    """

    layout: str
    backend: str
    is_split: bool
    num_experts: int
    capacity: int | None
    block: int

    def layout_of(self, operator: str) -> str | None:
        """The layout, as far as an operator knows of it."""
        return None if operator in OUTSIDE_LAYOUTS else self.layout

    def name(self, operator: str) -> str:
        """What the step of an operator is called."""
        return f"{operator}/{self.layout_of(operator) or '-'}/{self.backend}"

    def plan(self, topk_ids: jax.Array) -> Plan:
        """Where the rows of topk_ids [T, K] lie."""
        if self.layout == "block_sparse":
            return block_plan(topk_ids, self.num_experts, self.block, backend=self.backend)
        return make_plan(topk_ids, self.num_experts, capacity=self.capacity, backend=self.backend)

    def gate_up(self, rows: jax.Array, plan: Plan, weights: jax.Array, config: MoEConfig) -> Rows:
        """Rows [R, H], weights [E, H, 2, I] -> [R, I]."""
        if self.layout != "padded":
            return gate_up_projection(rows, plan.group_sizes, weights, math_of(config))
        h = _batched(rows, weights).astype(jnp.float32)
        return gated_halves(h, config.activation, config.activation_limit).astype(rows.dtype)

    def down(self, h: Any, plan: Plan, weights: jax.Array, config: MoEConfig) -> jax.Array:
        """H [R, I], weights [E, I, H] -> [R, H]."""
        if self.layout != "padded":
            return down_projection(h, plan.group_sizes, weights, math_of(config))
        return _batched(h, weights)


def block_plan(topk_ids: jax.Array, num_experts: int, block: int, *, backend: str = "auto") -> Plan:
    """A plan whose groups begin at multiples of `block` and are padded to whole blocks.

    Args:
      topk_ids: integer [T, K]; an id outside [0, E) makes no choice.
      num_experts: E.
      block: rows of a block.
      backend: of the sort.

    Returns:
      A Plan of as many rows as the worst load needs. Its group_sizes count the rows that pad a group as well; they
      have no assignment, and so have the blocks after the last group.
    """
    tight = make_plan(topk_ids, num_experts, backend=backend)
    num_assignments = topk_ids.size
    num_blocks = (num_assignments + min(num_experts, num_assignments) * (block - 1)) // block
    blocks = -(-tight.group_sizes // block)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    offsets = (ends - blocks) * block
    # Blocks past the last group count as its own, where they lie beyond its rows.
    number = jnp.arange(num_blocks, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, number, side="right"), num_experts - 1)
    rank = number[:, None] * block + jnp.arange(block, dtype=jnp.int32) - offsets[group][:, None]
    source = jnp.clip(tight.offsets[group][:, None] + rank, 0, max(num_assignments - 1, 0))
    order = jnp.where(rank < tight.group_sizes[group][:, None], tight.order[source], -1).reshape(-1)
    own = jnp.clip(topk_ids, 0, num_experts - 1)
    inverse = jnp.where(tight.inverse >= 0, tight.inverse + (offsets - tight.offsets)[own], -1)
    return Plan(order, inverse, blocks * block, offsets, tight.dropped)


def _batched(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Rows [E·C, K] · weights [E, K, …] -> [E·C, N] in the dtype of `rows`."""
    by_expert = rows.reshape(weights.shape[0], -1, rows.shape[1])
    matrices = weights.astype(rows.dtype).reshape(*weights.shape[:2], -1)
    product = jnp.einsum("eck,ekn->ecn", by_expert, matrices)
    return product.reshape(rows.shape[0], -1)

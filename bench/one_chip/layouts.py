"""Three ways to lay the rows of experts out for their products, behind one interface.

    padded        [E, C, H]: C = ⌈capacity factor · T·K / E⌉ rows for every expert; what does not fit is dropped and
                  counted; batched matrix products. GShard (arXiv 2006.16668), Switch (arXiv 2101.03961).
    compact       [T·K, H]: rows lie one after the other, groups begin where a prefix sum says; grouped products.
    block_sparse  each group is padded to whole blocks of rows, so that a block has the weights of one expert; grouped
                  products over whole blocks. MegaBlocks (arXiv 2211.15841), section 5.

A `Layout` makes a `Plan` of the router's choice, and multiplies rows that `dispatch` laid out by it. Rows that have no
assignment are zeros, and stay so: the experts have no biases here. Only "padded" drops; the others hold any load.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from moejax import MoEConfig
from moejax.experts import down_projection, gate_up_projection, math_of
from pallas_kernels.activations import gated_halves
from pallas_kernels.plan import Plan, make_plan
from pallas_kernels.quantize import Operand


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a layout needs to know.

    Attributes:
      num_experts: E.
      capacity: rows of an expert in the padded layout; the others do not look at it.
      block: rows of a block in the block-sparse one.
      backend: of the sort.
    """

    num_experts: int
    capacity: int
    block: int = 128
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_experts", "capacity", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to lay rows out.

    Attributes:
      name: as records have it.
      plan: (topk_ids [T, K], sizes) -> Plan.
      gate_up: (rows [R, H], plan, weights [E, H, 2, I], config) -> [R, I].
      down: (h [R, I], plan, weights [E, I, H], config) -> [R, H].
      drops: whether it has a capacity, beyond which it drops.
    """

    name: str
    plan: Callable[[jax.Array, Sizes], Plan]
    gate_up: Callable[[jax.Array, Plan, jax.Array, MoEConfig], Operand]
    down: Callable[[Any, Plan, jax.Array, MoEConfig], jax.Array]
    drops: bool = False


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


def _batched_gate_up(rows: jax.Array, plan: Plan, weights: jax.Array, config: MoEConfig) -> jax.Array:
    h = _batched(rows, weights).astype(jnp.float32)
    return gated_halves(h, config.activation, config.activation_limit).astype(rows.dtype)


def _grouped_gate_up(rows: jax.Array, plan: Plan, weights: jax.Array, config: MoEConfig) -> Operand:
    return gate_up_projection(rows, plan.group_sizes, weights, math_of(config))


def _grouped_down(h: Operand, plan: Plan, weights: jax.Array, config: MoEConfig) -> jax.Array:
    return down_projection(h, plan.group_sizes, weights, math_of(config))


_COMPACT = Layout(
    "compact",
    plan=lambda ids, sizes: make_plan(ids, sizes.num_experts, backend=sizes.backend),
    gate_up=_grouped_gate_up,
    down=_grouped_down,
)
_PADDED = Layout(
    "padded",
    plan=lambda ids, sizes: make_plan(ids, sizes.num_experts, capacity=sizes.capacity, backend=sizes.backend),
    gate_up=_batched_gate_up,
    down=lambda h, plan, weights, config: _batched(h, weights),
    drops=True,
)
_BLOCK_SPARSE = Layout(
    "block_sparse",
    plan=lambda ids, sizes: block_plan(ids, sizes.num_experts, sizes.block, backend=sizes.backend),
    gate_up=_grouped_gate_up,
    down=_grouped_down,
)
LAYOUTS: Mapping[str, Layout] = MappingProxyType({each.name: each for each in (_COMPACT, _PADDED, _BLOCK_SPARSE)})
"""By name; the first is what the others are compared with."""


def get_layout(name: str) -> Layout:
    """The layout called `name`.

    Raises:
      ValueError: there is none.
    """
    try:
        return LAYOUTS[name]
    except KeyError:
        raise ValueError(f"unknown layout {name!r}; expected one of {', '.join(LAYOUTS)}") from None

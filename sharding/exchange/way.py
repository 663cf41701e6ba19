"""What an exchange is told, and what the layer expects of whatever carries it out."""

import dataclasses
from typing import Any, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.quantize import Operand
from sharding.exchange.wire import Wire
from sharding.partition import ONE_CHIP, Axes
from sharding.placement import Placement

AUTO = "auto"
"""In `Way.transport`: the one that `sharding.exchange.pick` takes by itself."""


PLAN_NAME, DISPATCHED_NAME, RETURNED_NAME = "moe_plan", "moe_dispatched", "moe_returned"
"""The names by which policies of `jax.checkpoint` know the plan, and rows before and after the experts."""


@dataclasses.dataclass(frozen=True)
class Way:
    """The way of rows to their experts and back.

    Attributes:
      placement: which chip holds which expert.
      axes: the mesh axes that the layer is split over; `ONE_CHIP` on a single chip.
      wire: what rows are on the way out: in 8 bits, or None for their own dtype.
      backend: of plan, dispatch and combine.
      transport: a name in `sharding.exchange.pick.TRANSPORTS`, or "auto".
      max_choices: the most choices that the tokens of all chips make together, where most of topk_ids are −1; None for
        T·K a chip. It bounds the rows in memory on one chip, and sizes the buffers of an exchange over several.
      max_rows: the most rows that an expert can get from one chip; None for all.
    """

    placement: Placement
    axes: Axes = ONE_CHIP
    wire: Wire | None = None
    backend: str = "auto"
    transport: str = AUTO
    max_choices: int | None = None
    max_rows: int | None = None

    @property
    def columns_over(self) -> tuple[str, ...]:
        """The axes that share the width of each expert: rows travel in columns, a part on each of their chips."""
        return self.axes.mlp if self.axes.tp > 1 else ()

    @property
    def counted_choices(self) -> int | None:
        """`max_choices` times the chips that hold each token: a tensor axis that repeats tokens counts them on each."""
        copies = self.axes.size(tuple(axis for axis in self.axes.mlp if axis not in self.axes.tokens))
        return None if self.max_choices is None else copies * self.max_choices


class Experts(Protocol):
    """The local experts as a function of rows sorted by expert. Closes over nothing that is traced."""

    def __call__(self, params: Any, rows: Any, group_sizes: jax.Array) -> jax.Array:
        """Rows [R, H] (of the kind of x), group_sizes int32 [L] -> [R, H]; rows past their sum hold no token."""


class Transport(Protocol):
    """A way to carry an exchange out: a module of `sharding.exchange`, or anything else with these two functions."""

    def exchange(
        self,
        x: Operand,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        experts: Experts,
        params: Any,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """See `sharding.exchange.exchange`."""

    def rows_held(self, num_tokens: int, top_k: int, way: Way) -> int:
        """The rows that a chip with T tokens of K choices holds at once for its experts, used or not."""


def named(tree: Any, name: str) -> Any:
    """`tree`, every leaf with a name for the policies of `jax.checkpoint`."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), tree)

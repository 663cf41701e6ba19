"""How an exchange moves its rows."""

import dataclasses

from pallas_kernels.quantize import QDtype
from sharding.exchange.wire import Wire
from sharding.partition import ONE_CHIP, Axes
from sharding.placement import Placement

AUTO = "auto"
"""In `Way.transport`: the one that `sharding.exchange.pick` takes by itself."""


@dataclasses.dataclass(frozen=True)
class Way:
    """The way of rows to their experts and back.

    Attributes:
      placement: which chip holds which expert.
      axes: the mesh axes that the layer is split over; `ONE_CHIP` on a single chip.
      wire: how rows sent out are rounded to 8 bits, unless they already are; None keeps their dtype.
      backend: of plan, dispatch and combine, and of rounding for the wire.
      transport: a name in `sharding.exchange.pick.TRANSPORTS`, or "auto".
      max_choices: the most choices that the tokens of all chips make together, where most of topk_ids are −1; None for
        T·K a chip. It bounds the rows in memory on one chip, and sizes the buffers of an exchange over several.
      max_rows: the most rows that an expert can get from one chip; None for all.
      slab: S, where a chip has room for S rows from each of ep chips in a round; None for what
        `sharding.exchange.room.fit_slab` thinks best. Of transports that go in rounds.
      cotangent_dtype: 8-bit dtype in which cotangents of rows travel, with a scale for each row; None for their own.
    """

    placement: Placement
    axes: Axes = ONE_CHIP
    wire: Wire | None = None
    backend: str = "auto"
    transport: str = AUTO
    max_choices: int | None = None
    max_rows: int | None = None
    slab: int | None = None
    cotangent_dtype: QDtype | None = None

    @property
    def is_on_one_chip(self) -> bool:
        """Whether no row leaves its chip."""
        return self.axes.ep == self.axes.tp == 1

    @property
    def columns_over(self) -> tuple[str, ...]:
        """The axes that share the width of each expert: rows travel in columns, a part on each of their chips."""
        return self.axes.mlp if self.axes.tp > 1 else ()

    @property
    def counted_choices(self) -> int | None:
        """`max_choices` times the chips that hold each token: a tensor axis that repeats tokens counts them on each."""
        copies = self.axes.size(tuple(axis for axis in self.axes.mlp if axis not in self.axes.tokens))
        return None if self.max_choices is None else copies * self.max_choices

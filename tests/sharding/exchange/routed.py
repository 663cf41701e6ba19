"""The exact exchange as GPUs have it, row by row, on any platform."""

import dataclasses

import jax

from pallas_kernels.tracing.target import lowering_for
from sharding.exchange.between_chips import RoundPlan
from sharding.exchange.exact import Exact
from sharding.exchange.way import Way


@dataclasses.dataclass(frozen=True)
class AsOnGpus(Exact):
    """Plans as if the program were lowered for GPUs; what it plans is then carried by the operators' references."""

    def plan_rows(self, topk_ids: jax.Array, way: Way) -> RoundPlan:
        """See `Exact`."""
        with lowering_for("gpu"):
            return super().plan_rows(topk_ids, way)

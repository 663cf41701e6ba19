"""Sums of what the blocks of a cluster hold parts of, through each other's shared memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import swizzled
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS


@dataclasses.dataclass(frozen=True)
class ClusterSum:
    """Adds up what the blocks along an axis of a cluster hold for each other. Once a launch.

    Attributes:
      received: shared memory [warpgroups, blocks - 1, 64, columns], float32, where the others leave it.
      landed: one barrier for all warpgroups: of several, jax 0.11.2 reaches only the first in another block.
      axis: of the cluster.
    """

    received: Any
    landed: Any
    axis: str

    @staticmethod
    def scratch(warpgroups: int, blocks: int, columns: int) -> tuple[Any, Any]:
        """What to allocate for `received` and `landed`."""
        received = swizzled((warpgroups, blocks - 1, WGMMA_ROWS, columns), jnp.float32, any_row=False)
        return received, plgpu.Barrier(num_arrivals=warpgroups * (blocks - 1))

    def __call__(self, values: list[jax.Array], warpgroup: jax.Array) -> jax.Array:
        """The sum of what all blocks hold for the calling one.

        The same bits in every run: a block's own value comes first, then those of the others in their order.

        Args:
          values: for each block a tile [64, columns] in float32, in registers.
          warpgroup: index of the calling warpgroup, which sums with those of the same index; each calls it.
        """
        rank, total = lax.axis_index(self.axis), values[0]
        for block, value in enumerate(values):
            total = jnp.where(rank == block, value, total)

            @pl.when(rank != block)
            def _(block=block, value=value):
                place = self.received.at[warpgroup, jnp.where(rank < block, rank, rank - 1)]
                plgpu.async_store_smem(value, place, self.landed, cluster_idx=jnp.int32(block), cluster_dim=self.axis)

        plgpu.barrier_wait(self.landed)
        for place in range(len(values) - 1):
            total = total + plgpu.load(self.received.at[warpgroup, place], layout=plgpu.Layout.WGMMA)
        return total

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
class Exchange:
    """Where the blocks along an axis of a cluster leave what they hold for each other.

    Attributes:
      received: shared memory [warpgroups, blocks - 1, 64, columns], float32.
      landed: barrier of all warpgroups: of an array of barriers, jax 0.11.2 finds the first one only in other blocks.
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

    def sum(self, values: list[jax.Array], warpgroup: jax.Array) -> jax.Array:
        """The sum of what all blocks hold for the calling one; each warpgroup calls it once.

        The same bits in every run: a block's own value comes first, then those of the others in their order.

        Args:
          values: for each block a tile [64, columns] in float32, in registers.
          warpgroup: index of the calling warpgroup, which sums with those of the same index.
        """
        rank, total = lax.axis_index(self.axis), values[0]
        for block, value in enumerate(values):
            total = jnp.where(rank == block, value, total)

            @pl.when(rank != block)
            def _(block=block, value=value):
                self.send(value, block, jnp.where(rank < block, rank, rank - 1), warpgroup)

        for other in self.receive(warpgroup):
            total = total + other
        return total

    def send(self, value: jax.Array, block: int, place: jax.Array, warpgroup: jax.Array) -> None:
        """Stores a tile at a place in another block."""
        plgpu.async_store_smem(
            value,
            self.received.at[warpgroup, place],
            self.landed,
            cluster_idx=jnp.int32(block),
            cluster_dim=self.axis,
        )

    def receive(self, warpgroup: jax.Array) -> list[jax.Array]:
        """The tiles that the others have stored, by place."""
        plgpu.barrier_wait(self.landed)
        places = range(self.received.shape[1])
        return [plgpu.load(self.received.at[warpgroup, p], layout=plgpu.Layout.WGMMA) for p in places]

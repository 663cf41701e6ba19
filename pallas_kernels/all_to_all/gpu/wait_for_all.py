"""The end of a kernel that has written to other chips."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.all_to_all.device_id import device_id


def wait_for_all(done, block: jax.Array, num_blocks: int, axes: tuple[str, ...]) -> None:
    """Tells every chip that this block has written everything; block 0 then waits until every block of every chip has.

    Args:
      done: a semaphore of the whole grid, which each block of each chip signals once.
      block: of all `num_blocks` of this chip.
      num_blocks: the same on every chip.
      axes: along which the chips are.
    """
    chips = lax.axis_size(axes)
    for peer in range(chips):
        pl.semaphore_signal(done, 1, device_id=device_id(jnp.int32(peer), axes))

    @pl.when(block == 0)
    def _():
        pl.semaphore_wait(done, chips * num_blocks, decrement=False)

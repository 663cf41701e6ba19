"""A team's way through the phases, between two of which all teams of all blocks wait for each other."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.routed_mlp.gpu.down import Down
from pallas_kernels.routed_mlp.gpu.gate_up import GateUp
from pallas_kernels.routed_mlp.gpu.hits import list_hits
from pallas_kernels.routed_mlp.gpu.rounding import Rounding
from pallas_kernels.routed_mlp.gpu.scratch import Scratch
from pallas_kernels.routed_mlp.gpu.sizes import TEAMS, Between, Inputs, Sizes
from pallas_kernels.routed_mlp.gpu.walk import Phases, turns_of


def run_team(
    inputs: Inputs, between: Between, y: Any, scratch: Scratch, sizes: Sizes, block: jax.Array, phases: Phases
) -> None:
    """The phases, in their order, as the warpgroup that calls it."""
    known = inputs, between, y, scratch, sizes, block
    gate_up, rounding, down = GateUp(*known), Rounding(*known), Down(*known)
    team = gate_up.team
    multiplied, rounded = (Meeting(sizes) if all(phases) else None for _ in range(2))

    @pl.when(team == 0)
    def _():
        with jax.named_scope("list"):
            list_hits(inputs, scratch, sizes)

    if phases.up:

        @pl.when(team == TEAMS - 1)
        def _():
            gate_up.copy_x_scale()
            plgpu.barrier_arrive(scratch.scaled)

        plgpu.barrier_wait(scratch.scaled)
    plgpu.barrier_wait(scratch.listed)
    num_hits = scratch.num_hits[0]
    step: Any = jnp.int32(0)
    if phases.up:
        plgpu.barrier_wait(scratch.x_full)
        with jax.named_scope("gate_up"):
            step = gate_up.multiply(num_hits, step)
        with jax.named_scope("store h"):
            plgpu.wait_smem_to_gmem(0)
            if multiplied is not None:
                multiplied.arrive()
    if phases.rounding:
        # From the last team on: those have fewer tiles of h.
        worker = TEAMS * (sizes.config.blocks - block) - 1 - team
        workers = TEAMS * sizes.config.blocks
        turns = turns_of(worker, num_hits * (sizes.h_rows // WGMMA_ROWS), workers)

        @pl.when(turns > 0)
        def _():
            if multiplied is not None:
                with jax.named_scope("wait for h"):
                    multiplied.wait()
            with jax.named_scope("round"):
                lax.fori_loop(0, turns, lambda turn, _: rounding.round(worker + turn * workers), None)
                plgpu.wait_smem_to_gmem(0)

        if rounded is not None:
            with jax.named_scope("wait for rows"):
                rounded.arrive()
                rounded.wait()
    if phases.down:
        with jax.named_scope("down"):
            down.multiply(num_hits, step)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Meeting:
    """Where every team of every block arrives once, and those wait who need what the others have written."""

    def __init__(self, sizes: Sizes):
        self.semaphore = pl.get_global(plgpu.SemaphoreType.REGULAR)
        self.teams = TEAMS * sizes.config.blocks

    def arrive(self) -> None:
        """Tells that this team has written its part."""
        plgpu.semaphore_signal(self.semaphore, memory_scope="gpu")

    def wait(self) -> None:
        """Waits for all."""
        plgpu.semaphore_wait(self.semaphore, self.teams, decrement=False, memory_scope="gpu")

"""When a kernel starts beside the one before it in its stream, and what it fetches before that one has ended.

A kernel usually starts when the one before has ended and its writes are seen by all. With programmatic dependent launch
it starts when every block of the one before has allowed it (`launch_dependents`) or has ended, and says itself where it
needs the other's results (`wait`), which holds until all of that kernel has ended and been written:

    kernel N - 1   wait | launch_dependents | its work ................ end
    kernel N              starts in blocks' places as they end | ahead, wait | launch_dependents | its work ...

What makes that safe, whatever kernels stand before and behind:

1. Every warpgroup of every block waits, once, on every path, before it reads or writes anything that another kernel
   writes or reads: operands, sizes of groups, results (whose memory XLA may have taken from a buffer that the kernel
   before still reads). So when a kernel has ended, all those before it have, and waiting for one is waiting for all.
2. A block allows the next kernel only after its own wait. So when a kernel starts, all but the one just before it have
   ended: nothing overlaps with more than its neighbour.
3. Before the wait a kernel reads weights alone, and these only in two ways. "l2" asks the cache to fetch them, which
   gives no value to anyone: it is right whoever writes them. "smem" takes their values, which is a *promise of the
   caller*: the kernel before does not write them. Arguments of a program are such weights as long as no kernel of the
   program writes them and the program does not start right behind one that does; weights that are rounded or gathered
   on the way are not.
4. Which weights a block needs first may hang on results of the kernel before: then they are guessed, compared after the
   wait, and loaded again where the guess was wrong. Nothing that decides what is computed is read before the wait.

XLA's command buffers drop the edge between two kernels: all of this only has an effect with
XLA_FLAGS=--xla_gpu_enable_command_buffer= ; docs/prefetch.md says what it brings.
"""

import dataclasses
from typing import Any, Literal, get_args

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tracing.override import Override

Mode = Literal["none", "pdl", "l2", "smem"]


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """How a kernel meets its neighbours in the stream.

        with prefetching(Prefetch("smem", overlap=1.0, prefetch=1.0)):
            y = jax.jit(step)(x)    # traced here

    Attributes:
      mode: "none": a plain launch. "pdl": it starts early, and waits before it reads anything. "l2", "smem": as "pdl",
        and before it waits it fetches weights, into the cache or into the block's own memory; "smem" promises that the
        kernel before does not write them.
      overlap: the share of its work beside which the next kernel may start: 1 from its begin, 0 when all of it is under
        way; None (off) when it has ended.
      prefetch: the share of the weights that a block has room for which it fetches before it waits; None (off) for 0.
    """

    mode: Mode = "none"
    overlap: float | None = None
    prefetch: float | None = None

    def __post_init__(self):
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        for name in ("overlap", "prefetch"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio <= 1:
                raise ValueError(f"{name} must be a ratio in [0, 1], or None for off, got {ratio!r}")
        if self.overlap is not None and self.mode == "none":
            raise ValueError(f"overlap needs mode pdl, l2 or smem, got {self.overlap} with mode none")
        if self.prefetch is not None and self.mode not in ("l2", "smem"):
            raise ValueError(f"prefetch needs mode l2 or smem, got {self.prefetch} with mode {self.mode}")

    def ahead(self, pieces: int) -> int:
        """How many of the first `pieces` of the weights are fetched before the wait."""
        return round((self.prefetch or 0) * pieces)

    def begun(self, pieces: int) -> int | None:
        """How many of `pieces` of its work a block begins before it allows the next kernel; None for never."""
        return None if self.overlap is None else round((1 - self.overlap) * pieces)

    def wait(self) -> None:
        """Waits until the kernel before has ended and its writes are seen; nothing where this one starts after it."""
        if self.mode != "none" and not alone.get():
            plgpu.griddepcontrol_wait()

    def launch_dependents(self) -> None:
        """Allows the next kernel, as far as this block goes; more than once is as once. Only after `wait`."""
        if not alone.get():
            plgpu.griddepcontrol_launch_dependents()


PLAIN = Prefetch()
"""A plain launch."""

prefetching = Override[Prefetch]("prefetching")
"""Kernels traced inside `with prefetching(value)` have this value, if they know it: grouped products and RMSNorm."""

alone = Override[bool]("alone")
"""Kernels traced inside `with alone(True)` neither wait nor allow: interpret mode has no neighbours."""


def with_prefetch[Config: Any](config: Config) -> Config:
    """A kernel's configuration with the value of `prefetching`, where one is given."""
    prefetch = prefetching.get()
    return config if prefetch is None else dataclasses.replace(config, prefetch=prefetch)

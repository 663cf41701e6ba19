"""How far a kernel hides its copies behind its arithmetic, or the other way round, measured on the device.

A kernel runs three times: whole, its arithmetic alone, its copies alone. With perfect overlap the whole takes as long
as the longer of the two; with none, as long as both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

from bench.measure.clock import kernel_times, rotated
from pallas_kernels.stage import Stage

KERNEL_STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclasses.dataclass(frozen=True)
class OverlapTimes:
    """Device times of one call in µs.

    Attributes:
      elapsed: of the whole.
      comp_elapsed: of every multiplication, on tiles that stay in shared memory.
      dma_elapsed: of every copy.
    """

    elapsed: float
    comp_elapsed: float
    dma_elapsed: float

    @property
    def overlap(self) -> float:
        """1 − (elapsed − max) / min of the two parts: 1 hides all of the shorter, 0 nothing.

        Not clipped: above 1 a part alone is slower than the whole, below 0 the whole takes longer than both parts.
        """
        parts = self.comp_elapsed, self.dma_elapsed
        return 1 - (self.elapsed - max(parts)) / min(parts)

    def record(self) -> dict[str, float]:
        """Its JSON object."""
        return {**dataclasses.asdict(self), "overlap": self.overlap}


def measure_overlap(
    stage_function: Callable[[Stage], Callable[..., Any]], inputs: Sequence[Any], *, repeats: int = 10
) -> OverlapTimes:
    """Times the three functions that `stage_function` gives, each over all of `inputs` (see `bench.measure.clock`).

    Raises:
      ValueError: jax does not run on NVIDIA GPUs.
      Unsupported: the kernel cannot do this.
    """

    def microseconds(stage: Stage) -> float:
        program = rotated(stage_function(stage))
        return kernel_times(program, inputs, repeats=repeats, calls=len(inputs)).median_us

    return OverlapTimes(*map(microseconds, KERNEL_STAGES))

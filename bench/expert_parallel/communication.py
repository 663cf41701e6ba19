"""What an exchange costs a layer on NVIDIA GPUs, of which each kernel can be timed by its name."""

import dataclasses
import re
from collections.abc import Mapping

_BETWEEN_CHIPS = re.compile("all_?to_?all|all_?reduce|make_routes|nccl|barrier", re.IGNORECASE)
"""In the names of kernels that move rows, tell counts or wait for other chips: ours, XLA's, NCCL's."""


def link_us(kernels: Mapping[str, float]) -> float:
    """Of kernels by name, in microseconds, those that are between chips; a wait for a later chip is part of them."""
    return sum(time for name, time in kernels.items() if _BETWEEN_CHIPS.search(name))


@dataclasses.dataclass(frozen=True)
class Communication:
    """Times of a call of a layer in a chain of calls, in microseconds.

    Attributes:
      layer_us: by the wall clock.
      link_us: its kernels between chips, mean over the chips; what runs beside other work counts too.
      others_us: all its other kernels, mean over the chips.
    """

    layer_us: float
    link_us: float
    others_us: float

    @property
    def exposed_us(self) -> float:
        """What a layer takes beyond its other kernels: the exchange, unless work hides it; gaps between kernels; and
        what the busiest chip has more to do than the mean.
        """
        return self.layer_us - self.others_us

    @classmethod
    def of(cls, layer_us: float, kernels: Mapping[str, float]) -> "Communication":
        """From the kernels of a call, by name."""
        link = link_us(kernels)
        return cls(layer_us, link, sum(kernels.values()) - link)

    def record(self) -> dict[str, float]:
        """For evaluation.json."""
        return {**dataclasses.asdict(self), "exposed_us": self.exposed_us}

"""What an exchange costs a layer on NVIDIA GPUs, of which each kernel can be timed by its name."""

import dataclasses
import re
from collections.abc import Mapping

_BETWEEN_CHIPS = re.compile("all_to_all|make_routes|nccl|barrier", re.IGNORECASE)
"""In the names of kernels that move rows, tell counts or wait for other chips: ours, XLA's, NCCL's."""


def link_us(kernels: Mapping[str, float]) -> float:
    """Of kernels by name, the time of those that are between chips."""
    return sum(time for name, time in kernels.items() if _BETWEEN_CHIPS.search(name))


@dataclasses.dataclass(frozen=True)
class Communication:
    """Times of a layer on a chip, in microseconds.

    Attributes:
      layer: a call in a chain of calls, by the wall clock.
      link: its kernels between chips.
      others: all its other kernels.
    """

    layer: float
    link: float
    others: float

    @property
    def exposed(self) -> float:
        """What a layer takes beyond its other kernels: the exchange, unless work hides it, and gaps between kernels."""
        return self.layer - self.others

    @classmethod
    def of(cls, layer_us: float, kernels: Mapping[str, float]) -> "Communication":
        """From the kernels of a layer, by name."""
        link = link_us(kernels)
        return cls(layer_us, link, sum(kernels.values()) - link)

    def record(self) -> dict[str, float]:
        """For evaluation.json."""
        return {**dataclasses.asdict(self), "exposed": self.exposed}

"""TPU slices to compile for, named as the compiler names them: "v6e:4x8" is 32 chips of a v6e.

slice_ = parse_slice("tpu7x:2x2x4")
slice_.num_chips, slice_.num_devices        # 16, 32: jax shows two devices a chip there
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from bench.model.shapes import operand_dtype
from pallas_kernels.chips import Chip, ds_tpu_chip, get_chip

DS_TPU_CORES = 64


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the compiler and jax make of one kind of TPU.

    Attributes:
      chip: its row of `pallas_kernels.chips`.
      clock_hz: cycles a second of a core: its BF16 peak over twice the multiply-adds of a cycle, which are 4 · 128² on
        v5e and v5p and 4 · 256² on v6e and v7x.
      slices: shapes to choose from by the number of devices, ascending.
    """

    chip: str
    clock_hz: float
    slices: tuple[str, ...]


_TORUS_2D = ("4x8", "8x8", "8x16", "16x16")
_TORUS_3D = ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

GENERATIONS: Mapping[str, Generation] = {
    "v5e": Generation("v5e", 1.5e9, _TORUS_2D),
    "v5p": Generation("v5p", 1.75e9, _TORUS_3D),
    "v6e": Generation("v6e", 1.75e9, _TORUS_2D),
    "tpu7x": Generation("v7x", 2.2e9, _TORUS_3D),
}
"""By the name that stands before the colon."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind that are wired together, under the name that libtpu has for them."""

    name: str
    chip: Chip
    num_chips: int
    clock_hz: float

    @property
    def num_devices(self) -> int:
        """Devices that jax shows."""
        return self.num_chips * self.chip.jax_devices

    @property
    def device(self) -> Chip:
        """What one of its devices has: the chip, or its share of a chip."""
        return share_of(self.chip, self.chip.jax_devices)

    @property
    def devices(self) -> Sequence[jax.Device]:
        """The devices, to compile for; needs libtpu, and no TPU."""
        return topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices

    @property
    def one_device(self) -> Mesh:
        """A mesh of its first device."""
        return Mesh(self.devices[:1], "x")


def share_of(chip: Chip, parts: int) -> Chip:
    """One of the equal parts of a chip. Its fast memory is a core's and stays whole."""
    if parts == 1:
        return chip
    rates = ("hbm_bandwidth", "hbm_bytes", "link_bandwidth")
    return dataclasses.replace(
        chip,
        name=f"{chip.name} (1/{parts})",
        cores=chip.cores // parts,
        peak_flops={dtype: rate / parts for dtype, rate in chip.peak_flops.items()},
        **{name: getattr(chip, name) / parts for name in rates},
    )


def as_ds_tpu(device: Chip, dtype: str) -> Chip:
    """A chip for DS_TPU's model with a device's peak at `dtype`, its bandwidth and its links."""
    peak, bandwidth, link = device.peak(operand_dtype(dtype)) / 1e12, device.hbm_bandwidth / 1e9, device.link() / 1e9
    return ds_tpu_chip(device.name, DS_TPU_CORES, peak, bandwidth, "this device, as DS_TPU's", link)


def parse_slice(name: str) -> Slice:
    """The slice called `name`.

    Raises:
      ValueError: the name is not that of a known TPU, a colon, and a shape with as many sizes as its network has.
    """
    kind, colon, shape = name.lower().partition(":")
    kind = "tpu7x" if kind == "v7x" else kind
    generation = GENERATIONS.get(kind)
    if generation is None or not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"unknown topology {name!r}; expected a TPU and the shape of a slice, such as {examples()}")
    sizes = [int(size) for size in shape.split("x")]
    example = generation.slices[0]
    if len(sizes) != (rank := len(example.split("x"))):
        raise ValueError(
            f"topology {name!r}: slices of {kind} have {rank} dimensions, such as {kind}:{example}, got {len(sizes)}"
        )
    return Slice(f"{kind}:{shape}", get_chip(generation.chip), math.prod(sizes), generation.clock_hz)


def examples() -> str:
    """The smallest slice of each kind, between commas."""
    return ", ".join(f"{kind}:{generation.slices[0]}" for kind, generation in GENERATIONS.items())


def slices_for(num_devices: int) -> list[Slice]:
    """The smallest slice of each kind with at least `num_devices` devices, and at least 32.

    Raises:
      ValueError: there is none so large.
    """
    found = []
    for kind, generation in GENERATIONS.items():
        slices = (parse_slice(f"{kind}:{shape}") for shape in generation.slices)
        fitting = next((slice_ for slice_ in slices if slice_.num_devices >= max(32, num_devices)), None)
        if fitting is None:
            raise ValueError(f"no slice of {kind} with {num_devices} devices is known; name one with --topology")
        found.append(fitting)
    return found

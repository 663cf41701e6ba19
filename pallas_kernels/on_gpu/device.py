"""The GPU that kernels are compiled for, and whether it is one that they can be compiled for.

All kernels for NVIDIA GPUs are Hopper's. Those of grouped products need its matrix instructions; the others need only
what newer GPUs have as well, but have run on no other than a Hopper, and are not taken for proven elsewhere.
"""

import jax

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip, chip_of, get_chip
from pallas_kernels.tracing.target import target_chip

ASSUMED = "h200"
"""The GPU that kernels are cut for where none is at hand or named: lowering, and interpret mode, on a CPU."""

_UNLISTED = "h100"
"""The figures of a Hopper that `chips.CHIPS` does not list."""


def hopper_chip(operator: str) -> Chip:
    """The target of `targeting`, else the GPU at hand; an H200 where there is none.

    Args:
      operator: who asks, for the message.

    Raises:
      Unsupported: the target, or the GPU at hand, is no Hopper.
    """
    needs = f"{operator}: kernels for NVIDIA GPUs are made for Hopper (compute capability 9.0), got"
    if (target := target_chip()) is not None:
        if target.generation != "hopper":
            raise Unsupported(f"{needs} target {target.name!r} ({target.generation})")
        return target
    device = jax.devices()[0]
    if device.platform != "gpu":
        return get_chip(ASSUMED)
    if device.compute_capability != "9.0":
        raise Unsupported(f"{needs} {device.device_kind} with {device.compute_capability}")
    return chip_of(device) or get_chip(_UNLISTED)


def require_hopper(operator: str) -> None:
    """Raises Unsupported, naming the operator, where `hopper_chip` does."""
    hopper_chip(operator)

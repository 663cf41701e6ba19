"""The GPU that kernels are compiled for, and whether it is one that they can be compiled for."""

import jax

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip, chip_of, get_chip


def hopper_chip() -> Chip:
    """The GPU at hand; an H200 where there is none, since kernels can be lowered without a GPU.

    Raises:
      Unsupported: the GPU is not a Hopper, whose matrix instructions its kernels use.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        return get_chip("h200")
    if device.compute_capability != "9.0":
        raise Unsupported(
            f"grouped_matmul: needs a Hopper GPU (compute capability 9.0), got {device.device_kind} with "
            f"{device.compute_capability}"
        )
    return chip_of(device) or get_chip("h100")


def require_hopper(operator: str) -> None:
    """Raises Unsupported where JAX runs on a GPU older than Hopper."""
    device = jax.devices()[0]
    if device.platform == "gpu" and float(device.compute_capability) < 9.0:
        raise Unsupported(
            f"{operator}: needs a GPU of compute capability 9.0 or newer (Hopper), got {device.device_kind} with "
            f"{device.compute_capability}"
        )

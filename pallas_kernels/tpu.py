"""The TPU that kernels are compiled for, and what its cores can do."""

import jax

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip, chip_of, get_chip
from pallas_kernels.target import target_chip

ASSUMED = "v6e"
"""The TPU that kernels are cut for where none is at hand or named: interpret mode on a CPU."""


def tpu_chip() -> Chip:
    """The target of `targeting`, else the TPU at hand; v6e where there is none, as in interpret mode.

    Raises:
      Unsupported: the target is no TPU, or the TPU at hand is not one of `chips.CHIPS`.
    """
    if (target := target_chip()) is not None:
        if target.kind != "tpu":
            raise Unsupported(f"Pallas TPU kernels need a TPU, got target {target.name!r} ({target.kind})")
        return target
    device = jax.devices()[0]
    if device.platform != "tpu":
        return get_chip(ASSUMED)
    if (chip := chip_of(device)) is None:
        raise Unsupported(f"Pallas TPU kernels know v5e, v5p, v6e and v7x, got {device.device_kind}")
    return chip


def cores_of_a_device(chip: Chip) -> int:
    """TensorCores that act as one JAX device: both of a v5p, one of the others (a v7x is two devices)."""
    return chip.cores if chip.name == "v5p" else 1

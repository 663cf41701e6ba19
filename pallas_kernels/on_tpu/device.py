"""The TPU that kernels are compiled for, and what its cores can do."""

import contextlib

import jax

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import CHIPS, Chip, chip_of, get_chip
from pallas_kernels.tracing.target import target_chip

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
        known = ", ".join(name for name, known in CHIPS.items() if known.kind == "tpu")
        raise Unsupported(f"Pallas TPU kernels know {known}, got {device.device_kind}")
    return chip


def cores_of_a_device(chip: Chip) -> int:
    """TensorCores that act as one JAX device."""
    return chip.cores // chip.jax_devices


def as_on_a_tpu() -> contextlib.AbstractContextManager[object]:
    """A context that tells Pallas, which asks the mesh, what TPU it lowers for where there is none at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    told = mesh.abstract_device
    if jax.devices()[0].platform == "tpu" or (told is not None and told.platform == "tpu"):
        return contextlib.nullcontext()
    target = target_chip()
    chip = target if target is not None and target.kind == "tpu" else get_chip(ASSUMED)
    device = jax.sharding.AbstractDevice(
        device_kind=chip.device_kinds[0], num_cores=cores_of_a_device(chip), platform="tpu"
    )
    return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))

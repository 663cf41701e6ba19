"""What the tests of TPU kernels on a machine without a TPU share."""

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting


def interpreted(**options):
    """A context in which kernels for TPUs run on the CPU, and fail where they race or read what nobody wrote."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", **options
    )
    return pltpu.force_tpu_interpret_mode(params)


def lower_for_tpu(function, *args, chip: str = "v6e"):
    """Lowers for a TPU what interpret mode cannot run: its callbacks have effects, which jax.checkpoint refuses."""
    target = get_chip(chip)
    device = jax.sharding.AbstractDevice(device_kind=target.device_kinds[0], num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)  # what kernels are lowered for
    with pltpu.force_tpu_interpret_mode(None), targeting(target), jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",))


def is_interpreted(backend: str) -> bool:
    """Whether a test of `backend` runs in interpret mode."""
    return backend == "pallas_tpu" and jax.default_backend() != "tpu"

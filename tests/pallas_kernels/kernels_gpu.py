"""What the tests of GPU kernels on a machine without a GPU share."""

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.prefetch import alone
from pallas_kernels.plan import Plan


@contextlib.contextmanager
def interpreted(*, detect_races: bool = True):
    """A context in which kernels for NVIDIA GPUs run on the CPU, and fail where threads race."""
    with alone(True), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield


def lower_for_cuda(function, *args) -> None:
    """Lowers `function` for NVIDIA GPUs, as far as that needs none."""
    jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


def abstract_plan(num_tokens: int, top_k: int, num_groups: int = 8) -> Plan:
    """The shapes of a tight plan."""

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return Plan(ints(num_tokens * top_k), ints(num_tokens, top_k), ints(num_groups), ints(num_groups), ints())

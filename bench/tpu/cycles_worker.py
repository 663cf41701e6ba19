"""Compiles one product of `bench.cycles` for one TPU, as a static twin: the other end of it."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.model.workloads import GemmShape
from bench.tpu.cycles_cases import ACTIVATION, FUSED, INSTRUCTIONS, OURS, Case, Choice, function_of
from bench.tpu.libtpu import serve
from bench.tpu.pallas_calls import PallasCall, find_kernels
from bench.tpu.slices import parse_slice
from bench.tpu.static_twin import without_copies
from pallas_kernels.chips import Chip, get_chip
from pallas_kernels.on_tpu.device import cores_of_a_device
from pallas_kernels.tracing.target import targeting

FACTS = "facts.json"
"""Where it says what it compiles, before the compiler may end the process."""


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles job["choice"] in job["case"] for job["topology"]; what it is goes to `FACTS` in job["folder"].

    For job["kind"] "instructions" without the kernel's copies.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax tells of shapes that it has not tuned
    case = Case(**{**job["case"], "shape": GemmShape(**job["case"]["shape"])})
    choice = Choice(job["choice"]["implementation"], tuple(job["choice"]["tiles"]))
    slice_ = parse_slice(job["topology"])
    device = topologies.get_topology_desc(platform="tpu", topology_name=job["topology"]).devices[:1]
    mesh = Mesh(device, "x")
    chip = get_chip(slice_.generation.chip)
    if choice.implementation in (OURS, FUSED):
        case, chip = _of_one_core(case, chip)
    with targeting(chip), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sharding = NamedSharding(mesh, PartitionSpec())
        if choice.implementation == ACTIVATION:
            shape = (sum(case.sizes), case.shape.N)
            function: Any = function_of(choice)
            arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)]
            is_guess = False
        else:
            kernel = _kernel(choice, case)
            if job["kind"] == INSTRUCTIONS:
                equation = without_copies(kernel.equation)
                if equation is None:
                    raise ValueError("its copies are the compiler's own and cannot be left out")
                kernel = dataclasses.replace(kernel, equation=equation)
            function, arguments, is_guess = kernel.function, kernel.arguments(sharding), not kernel.is_static
        Path(job["folder"], FACTS).write_text(json.dumps({"is_guess": is_guess}))
        jax.jit(function, keep_unused=True).lower(*arguments).compile()
    return {}


def _kernel(choice: Choice, case: Case) -> PallasCall:
    shape, sizes = case.shape, np.asarray(case.sizes, np.int32)
    arguments = (
        jax.ShapeDtypeStruct((int(sizes.sum()), shape.K), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.G, shape.K, shape.N), jnp.bfloat16),
        jax.ShapeDtypeStruct(sizes.shape, sizes.dtype),
    )
    kernels = find_kernels(jax.jit(function_of(choice)).trace(*arguments).jaxpr, known={2: sizes})
    if len(kernels) != 1 or kernels[0].calls != 1:
        raise ValueError(f"expected one kernel, called once; there are {[(k.name, k.calls) for k in kernels]}")
    return kernels[0]


def _of_one_core(case: Case, chip: Chip) -> tuple[Case, Chip]:
    """Our kernel's share of a core, where two act as one device: every other column tile, which is half of them.

    The compiler cannot follow its scalar instructions otherwise. Peers' grids it divides by itself.
    """
    cores = cores_of_a_device(chip)
    if cores == 1:
        return case, chip
    share = dataclasses.replace(
        chip,
        cores=1,
        peak_flops={dtype: rate / cores for dtype, rate in chip.peak_flops.items()},
        hbm_bandwidth=chip.hbm_bandwidth / cores,
    )
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, N=case.shape.N // cores)), share


if __name__ == "__main__":
    serve(work)

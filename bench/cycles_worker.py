"""Finds and compiles the kernels of one product of `bench.cycles` for one TPU: the other end of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from bench.cycles_cases import Case, implementations
from bench.libtpu import one_line, serve
from bench.pallas_calls import PallasCall, find_kernels
from bench.static_cycles import compile_alone
from bench.tpu_slices import parse_slice
from bench.workloads import GemmShape
from pallas_kernels.chips import get_chip
from pallas_kernels.target import targeting


def work(job: dict[str, Any]) -> dict[str, Any]:
    """The kernels of job["implementation"] in job["case"], or with job["kernels"] the compiles of some of them."""
    case = Case(**{**job["case"], "shape": GemmShape(**job["case"]["shape"])})
    kernels: list[tuple[str, PallasCall]] = []
    reasons = {}
    for name, function in implementations(case)[job["implementation"]].items():
        try:
            kernels += [(name, kernel) for kernel in _find(function, case, job["topology"])]
        except Exception as error:  # a peer that cannot do a shape says so in its own way
            reasons[name] = one_line(f"{type(error).__name__}: {error}")
    if "kernels" in job:
        return compile_alone([kernel for _, kernel in kernels], job)
    listed = [
        {"configuration": name, "calls": kernel.calls, "is_guess": kernel.has_dynamic_loops or _is_open(kernel)}
        for name, kernel in kernels
    ]
    return {"kernels": listed, "reasons": reasons}


def _find(function: Any, case: Case, topology: str) -> list[PallasCall]:
    shape, slice_ = case.shape, parse_slice(topology)
    sizes = np.full(shape.G, shape.M, np.int32)
    arguments = (
        jax.ShapeDtypeStruct((shape.G * shape.M, shape.K), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.G, shape.K, shape.N), jnp.bfloat16),
        jax.ShapeDtypeStruct(sizes.shape, sizes.dtype),
    )
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1]
    mesh = Mesh(device, "x").abstract_mesh
    with targeting(get_chip(slice_.generation.chip)), jax.sharding.use_abstract_mesh(mesh):
        return find_kernels(jax.jit(function).trace(*arguments).jaxpr, known={2: sizes})


def _is_open(kernel: PallasCall) -> bool:
    return bool(kernel.dynamic_dims) and kernel.grid is None


if __name__ == "__main__":
    serve(work)

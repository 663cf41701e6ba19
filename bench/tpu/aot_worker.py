"""Compiles one layer for one slice and reads off the result what there is to read: the other end of `bench.aot`."""

import warnings
from typing import Any

import jax
import jaxlib
from jax.experimental import topologies

from bench.measure.clock import Stopwatch
from bench.measure.errors import one_line
from bench.tpu.aot_layer import LayerJob
from bench.tpu.hlo_text import Program, parse_program
from bench.tpu.libtpu import libtpu_version, serve
from bench.tpu.pallas_calls import find_kernels
from bench.tpu.static_cycles import compile_alone
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting

_SHOWN = 40


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles the `LayerJob` job["layer"], or its kernels one by one where job["kernels"] names some."""
    layer = LayerJob(**job["layer"])
    if "kernels" not in job:
        return compile_layer(layer)
    with warnings.catch_warnings(), targeting(get_chip(layer.slice.generation.chip)):
        warnings.simplefilter("ignore")  # they are shown with the layer
        function, shapes = layer.program(_topology(layer).devices)
        kernels = find_kernels(function.trace(*shapes).jaxpr)
        return compile_alone(kernels, {"topology": layer.topology, **job})


def compile_layer(layer: LayerJob) -> dict[str, Any]:
    """Compiles a layer; sizes are bytes of a device."""
    topology = _topology(layer)
    watch = Stopwatch()
    with warnings.catch_warnings(record=True) as notes, targeting(get_chip(layer.slice.generation.chip)):
        warnings.simplefilter("always")
        function, shapes = layer.program(topology.devices)
        traced = function.trace(*shapes)
        lowered = traced.lower()
    trace_seconds = watch.seconds
    compiled = lowered.compile()
    compile_seconds = watch.seconds - trace_seconds
    program = parse_program(compiled.as_text())
    return {
        "device_kind": topology.devices[0].device_kind,
        "trace_s": round(trace_seconds, 2),
        "compile_s": round(compile_seconds, 2),
        "memory": memory_record(compiled.memory_analysis()),
        "vmem_bytes": max((operation.vmem_bytes for operation, _ in program.executed()), default=0),
        "collectives": program.collectives(),
        **_operations(program),
        "kernels": [
            {"name": kernel.name, "calls": kernel.calls, "hbm_bytes": kernel.hbm_bytes}
            for kernel in find_kernels(traced.jaxpr)
        ],
        "notes": sorted({one_line(note.message, 400) for note in notes if issubclass(note.category, UserWarning)}),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "libtpu": libtpu_version()},
    }


def _topology(layer: LayerJob) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=layer.topology)


def memory_record(analysis: Any) -> dict[str, int]:
    """The compiler's own account of HBM. The arguments, what it needs beside them, and both at once."""
    sizes = {
        name: int(getattr(analysis, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    peak = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"] + sizes["generated_code"]
    return {**{f"{name}_bytes": size for name, size in sizes.items()}, "peak_bytes": peak}


def _operations(program: Program) -> dict[str, Any]:
    """XLA's own operations that take the most cycles; collectives, of which no cycles are known, are left out."""
    rows: dict[str, dict[str, Any]] = {}
    for operation, times in program.executed():
        if operation.collective is None and not operation.is_kernel and operation.cycles:
            name = f"{operation.opcode} {operation.source}".strip()
            row = rows.setdefault(name, {"name": name, "calls": 0, "cycles": 0})
            row["calls"] += times
            row["cycles"] += times * operation.cycles
    ranked = sorted(rows.values(), key=lambda row: -row["cycles"])
    return {
        "xla_cycles": sum(row["cycles"] for row in ranked),
        "xla_operations": ranked[:_SHOWN],
        "has_dynamic_loops": program.has_dynamic_loops,
    }


if __name__ == "__main__":
    serve(work)

"""Compiles one layer for one slice and reads off the result what there is to read: the other end of `bench.aot`."""

import warnings
from typing import Any

import jax
import jaxlib

from bench.measure.clock import Stopwatch
from bench.measure.errors import one_line
from bench.tpu.aot_layer import LayerJob
from bench.tpu.hlo_text import Program, parse_program
from bench.tpu.libtpu import LONGEST_REASON, libtpu_version, serve
from bench.tpu.pallas_calls import find_kernels
from bench.tpu.static_cycles import compile_alone
from pallas_kernels.tracing.target import targeting

_SHOWN = 40


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles the `LayerJob` job["layer"], or its kernels one by one where job["kernels"] names some.

    Of a layer sizes are bytes of a device.
    """
    layer = LayerJob(**job["layer"])
    watch = Stopwatch()
    with warnings.catch_warnings(record=True) as notes, targeting(layer.slice.chip):
        warnings.simplefilter("always")
        function, shapes = layer.program()
        traced = function.trace(*shapes)
        if "kernels" in job:
            kernels = find_kernels(traced.jaxpr)
            return compile_alone([kernel.alone for kernel in kernels], {"topology": layer.topology, **job})
        lowered = traced.lower()
    trace_seconds = watch.seconds
    compiled = lowered.compile()
    compile_seconds = watch.seconds - trace_seconds
    kernels, program = find_kernels(traced.jaxpr), parse_program(compiled.as_text())
    return {
        "device_kind": layer.slice.devices[0].device_kind,
        "trace_s": round(trace_seconds, 2),
        "compile_s": round(compile_seconds, 2),
        "memory": memory_record(compiled.memory_analysis()),
        "vmem_bytes": max((operation.vmem_bytes for operation, _ in program.executed()), default=0),
        "collectives": program.collectives(),
        **_operations(program),
        "kernels": [{name: getattr(kernel, name) for name in ("name", "calls", "hbm_bytes")} for kernel in kernels],
        "notes": sorted({one_line(x.message, LONGEST_REASON) for x in notes if issubclass(x.category, UserWarning)}),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "libtpu": libtpu_version()},
    }


def memory_record(analysis: Any) -> dict[str, int]:
    """The compiler's own account of HBM. The arguments, what it needs beside them, and both at once."""
    names = ("argument", "output", "alias", "temp", "generated_code")
    record = {f"{name}_bytes": int(getattr(analysis, f"{name}_size_in_bytes")) for name in names}
    return {**record, "peak_bytes": sum(record.values()) - 2 * record["alias_bytes"]}


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

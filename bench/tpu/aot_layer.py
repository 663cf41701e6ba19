"""The full-size layer compiled for a slice: shapes and shardings, no numbers, and what the compiler makes of them.

`bench.aot` runs this module, in a process of its own, as the other end of `bench.tpu.libtpu.run_job`.
"""

import collections
import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.expert_parallel.fit import reduce_width
from bench.measure.clock import Stopwatch
from bench.measure.errors import one_line
from bench.tpu.hlo_text import Program, parse_program
from bench.tpu.libtpu import LONGEST_REASON, libtpu_version, serve
from bench.tpu.pallas_calls import find_kernels
from bench.tpu.slices import Slice, parse_slice
from bench.tpu.static_cycles import compile_alone
from moejax import MoEConfig, MoEParams, get_preset, moe, param_specs, quantize_params
from moejax.axes import axes_on
from moejax.config import Precision
from moejax.param import Param
from moejax.params import map_table
from pallas_kernels.quantize import QDtype
from pallas_kernels.tracing.target import targeting
from sharding.mesh import make_mesh
from sharding.placement import Placement

_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class LayerJob:
    """What to compile.

    Attributes:
      topology: the slice, such as "v6e:4x8".
      model: a preset.
      ep: devices that share one set of experts.
      batch: tokens over the whole slice.
      precision: "w8a8" or "w16a16".
      weights: 8-bit dtype of "w8a8": "float8_e4m3fn", "float8_e5m2" or "int8".
      grad: the gradients of the parameters and of the input too.
      backend: of every operator.
      transport: what carries rows between devices.
      reduce: divide the widths by this.
    """

    topology: str
    model: str
    ep: int
    batch: int
    precision: Precision = "w8a8"
    weights: QDtype = "int8"
    grad: bool = False
    backend: str = "auto"
    transport: str = "auto"
    reduce: int = 1

    @property
    def slice(self) -> Slice:
        """The slice that `topology` names."""
        return parse_slice(self.topology)

    @property
    def dp(self) -> int:
        """Sets of experts on the slice."""
        return self.slice.num_devices // self.ep

    def config(self) -> MoEConfig:
        """The layer.

        Raises:
          ValueError: ep divides neither the experts nor the slice, or the model or a setting is unknown.
        """
        config = get_preset(self.model, precision=self.precision, backend=self.backend, transport=self.transport)
        config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, dtype=self.weights))
        Placement(config.num_experts, self.ep)  # raises where they do not fit
        devices = self.slice.num_devices
        if devices % self.ep:
            fitting = [n for n in range(1, devices + 1) if devices % n == 0 and config.num_experts % n == 0]
            raise ValueError(
                f"ep={self.ep} does not fit {self.topology}: it has {devices} devices, which must be a multiple of ep; "
                f"choose ep among {', '.join(map(str, fitting))}"
            )
        if self.batch < 1 or self.batch % devices:
            raise ValueError(
                f"batch must be a positive multiple of the {devices} devices of {self.topology}, got {self.batch}"
            )
        return reduce_width(config, self.reduce)

    def program(self) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function over the slice's devices, and the shapes of its arguments."""
        config = self.config()
        mesh = make_mesh(self.ep, self.dp, devices=self.slice.devices)
        tokens = NamedSharding(mesh, PartitionSpec(axes_on(mesh, None, config).tokens))
        x = jax.ShapeDtypeStruct((self.batch, config.hidden_size), config.dtype, sharding=tokens)
        params = abstract_params(config, mesh, training=self.grad)

        forward = functools.partial(moe, config=config, mesh=mesh)
        if not self.grad:
            return jax.jit(forward), (x, params)

        def loss(x: jax.Array, params: MoEParams) -> jax.Array:
            y, aux = forward(x, params)
            return jnp.square(y.astype(jnp.float32)).mean() + aux.loss

        shardings = jax.tree.map(lambda leaf: leaf.sharding, (x, params))
        return jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings), (x, params)


def abstract_params(config: MoEConfig, mesh: Mesh, *, training: bool) -> MoEParams:
    """Shapes, dtypes and shardings of the parameters on `mesh`.

    In training they are all in config.param_dtype; for serving the experts' weights are in config.dtype, or in 8 bits.
    """

    def abstract(row: Param) -> jax.ShapeDtypeStruct:
        is_served = row.kind == "kernel" and not training
        return jax.ShapeDtypeStruct(row.shape, config.dtype if is_served else config.param_dtype)

    params = map_table(abstract, config)
    if config.precision == "w8a8" and not training:
        params = jax.eval_shape(functools.partial(quantize_params, config=config), params)
    specs = param_specs(params, config, axes_on(mesh, None, config))
    return jax.tree.map(lambda leaf, spec: leaf.update(sharding=NamedSharding(mesh, spec)), params, specs)


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
    calls, cycles = collections.Counter[str](), collections.Counter[str]()
    for operation, times in program.executed():
        if operation.collective is None and not operation.is_kernel and operation.cycles:
            name = f"{operation.opcode} {operation.source}".strip()
            calls[name] += times
            cycles[name] += times * operation.cycles
    most = cycles.most_common(_SHOWN)
    return {
        "xla_cycles": cycles.total(),
        "xla_operations": [{"name": name, "calls": calls[name], "cycles": taken} for name, taken in most],
        "has_dynamic_loops": program.has_dynamic_loops,
    }


if __name__ == "__main__":
    serve(work)

"""Compiles a few kernels for one TPU, without one: the other end of test_aot_gate.py."""

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.libtpu import one_line, serve
from bench.pallas_calls import find_kernels
from bench.tpu_slices import parse_slice
from pallas_kernels.chips import get_chip
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor
from pallas_kernels.target import targeting

GROUPS, TOKENS, TOP_K, HIDDEN, WIDTH = 8, 40, 4, 1024, 512
ROWS = TOKENS * TOP_K
LARGE = 65536  # tokens that no VMEM holds


def cases(array, chip) -> dict:
    """Name -> function and shapes; `array(shape, dtype)` makes one."""
    ints = "int32"
    groups = array((GROUPS,), ints)
    plan = Plan(array((ROWS,), ints), array((TOKENS, TOP_K), ints), groups, groups, array((), ints))
    large = Plan(array((2 * LARGE,), ints), array((LARGE, 2), ints), groups, groups, array((), ints))
    eight = "float8_e4m3fn" if chip.is_native("float8_e4m3fn") else "int8"
    weights = QTensor(array((GROUPS, WIDTH, HIDDEN), eight), array((GROUPS, WIDTH // 128, HIDDEN // 128), "float32"))
    lhs = QTensor(array((ROWS, HIDDEN), eight), array((ROWS, HIDDEN // 128), "float32"))
    rows, dense = array((ROWS, HIDDEN), "bfloat16"), array((GROUPS, HIDDEN, WIDTH), "bfloat16")
    on_tpu = {"backend": "pallas_tpu"}

    def gradients(function, *args):
        return jax.grad(lambda *args: function(*args).astype(jnp.float32).sum(), argnums=tuple(range(len(args))))(*args)

    return {
        "dispatch": (lambda x, plan: dispatch(x, plan, **on_tpu), array((TOKENS, HIDDEN), "bfloat16"), plan),
        "dispatch 8 bits": (lambda x, plan: dispatch(x, plan, **on_tpu), array((TOKENS, HIDDEN), eight), plan),
        "dispatch float16": (lambda x, plan: dispatch(x, plan, **on_tpu), array((TOKENS, HIDDEN), "float16"), plan),
        "dispatch 2880": (lambda x, plan: dispatch(x, plan, **on_tpu), array((TOKENS, 2880), "bfloat16"), plan),
        "dispatch streamed": (lambda x, plan: dispatch(x, plan, **on_tpu), array((LARGE, HIDDEN), "bfloat16"), large),
        "combine": (
            lambda rows, weights, plan: gradients(
                lambda rows, weights: combine(rows, plan, weights, **on_tpu), rows, weights
            ),
            rows,
            array((TOKENS, TOP_K), "float32"),
            plan,
        ),
        "gate/up": (lambda *args: grouped_gate_up(*args, **on_tpu), rows, dense, groups),
        "matmul": (
            lambda lhs, rhs, sizes: gradients(lambda *args: grouped_matmul(*args, sizes, **on_tpu), lhs, rhs),
            rows,
            dense,
            groups,
        ),
        "matmul 8 bits": (lambda *args: grouped_matmul(*args, transpose_rhs=True, **on_tpu), lhs, weights, groups),
    }


def work(job: dict) -> dict:
    """For each case, the kernels in it, or why it does not compile."""
    slice_ = parse_slice(job["topology"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name)
    mesh = Mesh(topology.devices[:1], "x")
    sharding = NamedSharding(mesh, PartitionSpec())
    chip = get_chip(slice_.generation.chip)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    answers = {}
    for name, (function, *shapes) in cases(array, chip).items():
        try:
            with targeting(chip), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                traced = jax.jit(function).trace(*shapes)
                traced.lower().compile()
            answers[name] = sorted({kernel.name for kernel in find_kernels(traced.jaxpr)})
        except Exception as error:
            answers[name] = one_line(f"{type(error).__name__}: {error}")
    return answers


if __name__ == "__main__":
    serve(work)

"""Compiles a few kernels for TPUs, without one: the other end of test_aot_gate.py."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.measure.errors import describe
from bench.tpu.libtpu import LONGEST_REASON, serve
from bench.tpu.pallas_calls import find_kernels
from bench.tpu.slices import parse_slice
from moejax import MoEConfig, MoEParams, Partition, Quantization, moe
from pallas_kernels.all_to_all import Blocks, all_to_all
from pallas_kernels.columns import Columns
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul, grouped_matmul_of_columns
from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor, dequantize
from pallas_kernels.rms_norm import rms_norm, rms_norm_in_8_bits
from pallas_kernels.tracing.target import targeting
from tests.helpers import gradients
from tests.pallas_kernels.grouped_matmul.grouped import drhs

GROUPS, TOKENS, TOP_K, HIDDEN, WIDTH = 8, 40, 4, 1024, 512
ROWS = TOKENS * TOP_K
ONE_CHIP = Partition(expert=None)
LARGE = 65536  # tokens that no VMEM holds


def cases(array, chip, mesh) -> dict:
    """Name -> function and shapes; `array(shape, dtype)` makes one."""
    ints = "int32"
    groups = array((GROUPS,), ints)
    plan = Plan(array((ROWS,), ints), array((TOKENS, TOP_K), ints), groups, groups, array((), ints))
    large = Plan(array((2 * LARGE,), ints), array((LARGE, 2), ints), groups, groups, array((), ints))
    eight = "float8_e4m3fn" if chip.is_native("float8_e4m3fn") else "int8"
    rows, dense = array((ROWS, HIDDEN), "bfloat16"), array((GROUPS, HIDDEN, WIDTH), "bfloat16")
    on_tpu = {"backend": "pallas_tpu"}
    split, whole = PartitionSpec(*mesh.axis_names), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(split, split, split, whole, whole), out_specs=split)
    def sharded(x, weights, rhs, sizes, plan):
        rows = grouped_matmul(dispatch(x, plan, **on_tpu), rhs, sizes, **on_tpu)
        return combine(rows, plan, weights, **on_tpu)

    def onto_sums(lhs, left, dout, right, sizes, onto):
        columns, dtype = (Columns(lhs, left), Columns(dout, right)), onto.dtype
        rows = lhs.T.astype("bfloat16"), dout.T.astype("bfloat16")
        in_8_bits = grouped_matmul_of_columns(*columns, sizes, preferred_element_type=dtype, onto=onto, **on_tpu)
        return in_8_bits, drhs("pallas_tpu", *rows, sizes, onto, out_dtype=dtype)

    def columns(dtype):
        """Operands of a gradient of weights in 8 bits, the second of this dtype."""
        return (
            array((2880, 4096), eight),
            array((32, 2880), "float32"),
            array((1536, 4096), dtype),
            array((32, 1536), "float32"),
            groups,
        )

    def training_step(x, router, gate_up, down, direction):
        """In the 8 bits that the chip multiplies: all products in FP8, or the forward pass in INT8."""
        quantization = Quantization(dtype=eight)
        if eight != "int8":
            quantization = Quantization(gradient_dtype=eight, weights_gradient_dtype=eight)
        config = MoEConfig(HIDDEN, WIDTH, GROUPS, TOP_K, precision="w8a8", quantization=quantization, **on_tpu)
        params = MoEParams(router={"kernel": router}, gate_up=gate_up, down=down)
        y, pullback = jax.vjp(lambda x, params: moe(x, params, config, partition=ONE_CHIP)[0], x, params)
        return y, pullback(direction)

    return {
        "training step": (
            training_step,
            array((TOKENS, HIDDEN), "bfloat16"),
            array((HIDDEN, GROUPS), "float32"),
            array((GROUPS, HIDDEN, 2, WIDTH), "float32"),
            array((GROUPS, WIDTH, HIDDEN), "float32"),
            array((TOKENS, HIDDEN), "bfloat16"),
        ),
        "gradient of weights in 8 bits": (
            lambda lhs, left, dout, right, sizes: grouped_matmul_of_columns(
                Columns(lhs, left), Columns(dout, right), sizes, backend="pallas_tpu"
            ),
            *columns("float8_e5m2"),
        ),
        "gradients onto sums": (onto_sums, *columns(eight), array((GROUPS, 2880, 1536), "float32")),
        "gradients onto sums in bf16": (onto_sums, *columns(eight), array((GROUPS, 2880, 1536), "bfloat16")),
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
        "combine onto a residual": (
            lambda rows, weights, plan, residual: combine(rows, plan, weights, residual=residual, **on_tpu),
            rows,
            array((TOKENS, TOP_K), "float32"),
            plan,
            array((TOKENS, HIDDEN), "float32"),
        ),
        "in shard_map": (
            lambda x, weights, rhs, sizes, plan: gradients(
                lambda x, weights, rhs: sharded(x, weights, rhs, sizes, plan), x, weights, rhs
            ),
            array((TOKENS, HIDDEN), "bfloat16"),
            array((TOKENS, TOP_K), "float32"),
            dense,
            groups,
            plan,
        ),
        **norms(array),
        **products(array, groups, rows, dense),
    }


def norms(array) -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """Norms that the chips treat differently."""

    def in_8_bits(dtype, scaling):
        return lambda x, weight: rms_norm_in_8_bits(
            x, weight, residual=x, dtype=dtype, scaling=scaling, backend="pallas_tpu"
        )

    def with_gradients(x, weight):
        return gradients(lambda *args: sum(rms_norm(*args, residual=x, backend="pallas_tpu")), x, weight)

    x, weight = array((300, 7168), "bfloat16"), array((7168,), "float32")
    return {
        "rms_norm gradients": (with_gradients, x, weight),
        "rms_norm 2880": (with_gradients, array((300, 2880), "float32"), array((2880,), "bfloat16")),
        "rms_norm e4m3 blocks": (in_8_bits("float8_e4m3fn", "1x128"), x, weight),
        "rms_norm e5m2": (in_8_bits("float8_e5m2", "per_row"), x, weight),
        "rms_norm int8": (in_8_bits("int8", "per_row"), array((300, 2880), "bfloat16"), array((2880,), "float32")),
    }


def products(array, groups, rows, dense) -> dict[str, tuple[Callable[..., Any], Any, Any, Any]]:
    """The grouped products: dtypes, layouts and scales that the chips treat differently."""

    def eight_bits(dtype, shape, scale):
        return QTensor(array(shape, dtype), array(scale, "float32"))

    def matmul(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, backend="pallas_tpu")

    def gate_up(lhs, rhs, sizes):
        return grouped_gate_up(lhs, rhs, sizes, backend="pallas_tpu")

    def gate_up_relu2(lhs, rhs, sizes):
        return grouped_gate_up(lhs, rhs, sizes, activation="relu2", backend="pallas_tpu")

    def gate_up_k_major(lhs, rhs, sizes):
        return grouped_gate_up(lhs, rhs, sizes, transpose_rhs=True, backend="pallas_tpu")

    fp8, int8 = "float8_e4m3fn", "int8"
    deep, wide = HIDDEN // 128, WIDTH // 128
    in_blocks = eight_bits(fp8, (ROWS, HIDDEN), (ROWS, deep))
    by_channel = {dtype: eight_bits(dtype, (GROUPS, HIDDEN, WIDTH), (GROUPS, 1, WIDTH)) for dtype in (fp8, int8)}
    float32 = array((ROWS, HIDDEN), "float32"), array((GROUPS, HIDDEN, WIDTH), "float32")
    return {
        "matmul gradients": (
            lambda lhs, rhs, sizes: gradients(lambda *args: matmul(*args, sizes), lhs, rhs),
            rows,
            dense,
            groups,
        ),
        "gate/up gradients": (
            lambda lhs, rhs, sizes: gradients(lambda *args: gate_up(*args, sizes), lhs, rhs),
            rows,
            dense,
            groups,
        ),
        "gate/up relu2": (gate_up_relu2, rows, dense, groups),
        "gate/up K-major": (gate_up_k_major, rows, array((GROUPS, WIDTH, HIDDEN), "bfloat16"), groups),
        "matmul float32": (matmul, *float32, groups),
        "matmul float32, deep": (
            matmul,
            array((ROWS, 7168), "float32"),
            array((GROUPS, 7168, 2048), "float32"),
            groups,
        ),
        "matmul no whole tiles": (
            matmul,
            array((301, 200), "bfloat16"),
            array((GROUPS, 200, 450), "bfloat16"),
            groups,
        ),
        "matmul 2880": (matmul, array((ROWS, 2880), "bfloat16"), array((GROUPS, 2880, 2880), "bfloat16"), groups),
        "gate/up fp8 blocks": (
            gate_up,
            in_blocks,
            eight_bits(fp8, (GROUPS, HIDDEN, WIDTH), (GROUPS, deep, wide)),
            groups,
        ),
        "gate/up fp8 blocks K-major": (
            gate_up_k_major,
            in_blocks,
            eight_bits(fp8, (GROUPS, WIDTH, HIDDEN), (GROUPS, wide, deep)),
            groups,
        ),
        "matmul e5m2 by e4m3": (
            matmul,
            eight_bits("float8_e5m2", (ROWS, HIDDEN), (1, 1)),
            by_channel[fp8],
            groups,
        ),
        "matmul int8": (matmul, eight_bits(int8, (ROWS, HIDDEN), (ROWS, 1)), by_channel[int8], groups),
        "gate/up int8 weights": (gate_up, rows, by_channel[int8], groups),
    }


def exchanges(devices) -> dict:
    """What runs over all devices of a slice, on a mesh of which not all axes take part."""
    mesh = Mesh(np.asarray(devices).reshape(2, -1), ("data", "expert"))
    split = PartitionSpec(("data", "expert"))
    chips = len(devices)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((chips * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, split))

    def there_and_back(values, scale, *tables):
        blocks = Blocks(*tables)
        rows = all_to_all(QTensor(values, scale), blocks, 2 * ROWS, ("expert",), backend="pallas_tpu")

        def back(rows):
            return all_to_all(rows, blocks.back, ROWS, ("expert",), backend="pallas_tpu")

        return rows, gradients(back, dequantize(rows, "bfloat16"))

    function = jax.shard_map(there_and_back, mesh=mesh, in_specs=split, out_specs=split)
    tables = [array((chips // 2, GROUPS), "int32")] * 6
    rows = array((ROWS, HIDDEN), "int8"), array((ROWS, HIDDEN // 128), "float32")
    return {"all_to_all": (function, *rows, *tables)}


def work(job: dict) -> dict:
    """For each TPU and case of the job, the kernels in it, or why it does not compile."""
    return {topology: answers(topology, job["cases"]) for topology in job["topologies"]}


def answers(topology: str, names: list[str]) -> dict[str, list[str] | str]:
    """Those of one TPU."""
    slice_ = parse_slice(topology)
    mesh, chip = slice_.one_device, slice_.chip
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    found: dict[str, list[str] | str] = {}
    programs = cases(array, chip, mesh) | exchanges(slice_.devices)
    for name in names:
        function, *shapes = programs[name]
        try:
            on_mesh = jax.tree.leaves(shapes)[0].sharding.mesh
            with targeting(chip), jax.sharding.use_abstract_mesh(on_mesh.abstract_mesh):
                traced = jax.jit(function).trace(*shapes)
                traced.lower().compile()
            found[name] = sorted({kernel.name for kernel in find_kernels(traced.jaxpr)})
        except Exception as error:
            found[name] = describe(error, LONGEST_REASON)
    return found


if __name__ == "__main__":
    gc.disable()  # it traces, compiles and ends
    serve(work)

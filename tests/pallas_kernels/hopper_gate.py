"""Compiles kernels for an H200, without one, down to its instructions: the other end of test_hopper_gate.py."""

import functools
import gc
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.hopper.products import Product, make_inputs
from bench.measure.errors import describe
from bench.model.shapes import GemmShape
from bench.tpu.libtpu import serve
from moejax import MoEConfig, Quantization, fused_experts, moe, quantize_params
from moejax.params import param_shapes
from pallas_kernels.activations import Activation
from pallas_kernels.all_to_all import all_to_all, make_routes
from pallas_kernels.chips import get_chip
from pallas_kernels.columns import Columns, padded_rows
from pallas_kernels.combine import combine
from pallas_kernels.dense_matmul import dense_gate_up, dense_matmul
from pallas_kernels.dispatch import dispatch
from pallas_kernels.float32_matmul import float32_matmul
from pallas_kernels.gated_activation import gated_activation, gated_activation_in_8_bits
from pallas_kernels.gated_activation.gradients import pulled, pulled_with_columns
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul, grouped_matmul_of_columns
from pallas_kernels.on_gpu.prefetch import Prefetch, prefetching
from pallas_kernels.plan import Plan, make_plan, unsorted_plan
from pallas_kernels.quantize import QTensor, ToRound, dequantize, quantize
from pallas_kernels.quantize_columns import quantize_columns
from pallas_kernels.quantize_rows import quantize_rows
from pallas_kernels.quantize_transpose import quantize_transpose
from pallas_kernels.rms_norm import rms_norm, rms_norm_in_8_bits
from pallas_kernels.routed_mlp import routed_mlp
from pallas_kernels.top_k import Groups, ranked_top_k
from pallas_kernels.tracing.target import targeting
from tests.helpers import gradients
from tests.pallas_kernels.grouped_matmul.grouped import drhs
from tests.pallas_kernels.kernels_gpu import abstract_plan

TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
}
"""
"""What XLA asks of a GPU that is not there."""

NEGLIGIBLE_SPILL = 64
"""Bytes of a thread: a few registers, once a tile, cost nothing."""

Case = tuple[Callable[..., Any], *tuple[Any, ...]]


def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def product(*shape: int, dtype: Any, **options: Any) -> Case:
    """A grouped product at the size that is measured."""
    made = Product(GemmShape(*shape), dtype, **options)
    return made.run, *jax.eval_shape(lambda: make_inputs(made))


def of_columns(*shape: int, dtype: str, out_dtype: str) -> Case:
    """The gradient of weights in 8 bits, of G groups of M rows, K and N features; `dtype` is that of the cotangent."""
    groups, rows, depth, columns = shape
    padded = padded_rows(groups * rows, groups)
    lhs, dout = (
        Columns(array(dtype, features, padded), array("float32", padded // 128, features))
        for features, dtype in ((depth, "float8_e4m3fn"), (columns, dtype))
    )
    run = functools.partial(grouped_matmul_of_columns, preferred_element_type=out_dtype, backend="pallas_gpu")
    return run, lhs, dout, array("int32", groups)


def onto_sums(*shape: int, dtype: str = "float32") -> Case:
    """Both gradients of weights, added to an array."""
    groups, rows, depth, columns = shape
    in_8_bits, left, right, sizes = of_columns(*shape, dtype="float8_e4m3fn", out_dtype=dtype)

    def run(lhs: jax.Array, dout: jax.Array, left: Columns, right: Columns, sizes: jax.Array, sums: Any) -> Any:
        in_16_bits = drhs("pallas_gpu", lhs, dout, sizes, sums[0], out_dtype=dtype)
        return in_16_bits, in_8_bits(left, right, sizes, onto=sums[1])

    lhs, dout = (array("bfloat16", groups * rows, n) for n in (depth, columns))
    return run, lhs, dout, left, right, sizes, [array(dtype, groups, depth, columns)] * 2


def layer(num_tokens: int, **options: Any) -> tuple[MoEConfig, Any, Any]:
    """The layer of Qwen3-30B-A3B, tokens, and parameters."""
    config = MoEConfig(
        hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8, backend="pallas_gpu", **options
    )
    shapes = param_shapes(config)
    params = jax.tree.map(lambda s: array("bfloat16", *s), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return config, array("bfloat16", num_tokens, 2048), params


def expert_activation(
    h: jax.Array, dout: jax.Array, weights: jax.Array, activation: Activation, limit: float | None = None
) -> Any:
    """All that a layer in 8 bits takes of the activation, forward and backward."""
    forward = gated_activation_in_8_bits(
        h, weights, activation=activation, activation_limit=limit, backend="pallas_gpu"
    )
    in_8_bits = jnp.dtype("float8_e5m2")
    options: Any = {"activation": activation, "limit": limit, "with_array": True, "in_8_bits": in_8_bits}
    options |= {"with_result": h.dtype, "result_in_8_bits": jnp.dtype("float8_e4m3fn")}
    return forward, pulled("pallas_gpu", h=h, dout=dout, row_weights=weights, **options, with_weights=True)


def columns(dtype: str, num_tokens: int, features: int, num_rows: int | None = None) -> Case:
    """Rows of 128 groups with the rows last; with `num_rows`, rows of tokens."""
    ids = () if num_rows is None else (array("int32", num_rows),)
    return (
        lambda x, sizes, *ids: quantize_columns(x, sizes, row_ids=ids[0] if ids else None, backend="pallas_gpu"),
        array(dtype, num_tokens, features),
        array("int32", 128),
        *ids,
    )


def of_few_rows(num_rows: int, dtype: str, depth: int = 2880, columns: int = 128) -> Case:
    """The router's product; `dtype` is that of its weights."""
    shapes = array("bfloat16", num_rows, depth), array(dtype, depth, columns)
    return functools.partial(float32_matmul, backend="pallas_gpu"), *shapes


def dense(*shape: int, dtype: str = "bfloat16") -> Case:
    """Both products of a dense network, of M tokens, H and I."""
    rows, hidden, width = shape

    def run(x: jax.Array, gate_up: jax.Array, down: jax.Array, residual: jax.Array) -> jax.Array:
        h = dense_gate_up(x, gate_up, backend="pallas_gpu")
        return dense_matmul(h, down, residual=residual, backend="pallas_gpu")

    tokens = array(dtype, rows, hidden)
    return run, tokens, array(dtype, hidden, 2, width), array(dtype, width, hidden), tokens


def activation_with_columns(activation: Activation, in_8_bits: str, limit: float | None = None) -> Case:
    """The pullback for gradients of weights in 8 bits."""
    options = {"activation": activation, "limit": limit, "in_8_bits": jnp.dtype(in_8_bits), "with_weights": True}
    options |= {"result_in_8_bits": jnp.dtype("float8_e4m3fn")}
    names = "h", "dout", "row_weights", "group_sizes"
    return (
        lambda *operands: pulled_with_columns("pallas_gpu", **dict(zip(names, operands, strict=True)), **options),
        array("bfloat16", 32768, 1536),
        array("bfloat16", 32768, 768),
        array("float32", 32768),
        array("int32", 128),
    )


def training_step(**options: Any) -> Case:
    """The gradients of a whole layer."""
    config, x, params = layer(4096, **options)
    return lambda x, params: gradients(lambda *args: moe(*args, config)[0], x, params), x, params


def serving(num_tokens: int) -> Case:
    """A whole layer of which no gradient is asked; its rows are no other case's: a kernel is reported once."""
    config, x, params = layer(num_tokens, precision="w8a8")
    in_8_bits = jax.eval_shape(lambda p: quantize_params(p, config), params)
    return lambda x, params: moe(x, params, config, residual=x)[0], x, in_8_bits


def early(case: Case, *prefetch: Any) -> Case:
    """A case whose kernels start before those before them have ended."""
    function, *args = case

    def run(*args: Any) -> Any:
        with prefetching(Prefetch(*prefetch)):
            return function(*args)

    return run, *args


CASES: dict[str, Callable[[], Case]] = {
    "decode": lambda: product(8, 48, 7168, 2048, dtype="bf16"),
    "decode fp8": lambda: product(8, 48, 7168, 2048, dtype="fp8"),
    "decode down fp8": lambda: product(8, 48, 2048, 7168, dtype="fp8"),
    "prefill fp8": lambda: product(8, 4096, 7168, 4096, dtype="fp8"),
    "prefill fp8 blocks": lambda: product(8, 4096, 7168, 4096, dtype="fp8-blocks"),
    "gate/up fp8 to fp8": lambda: product(8, 48, 7168, 4096, dtype="fp8", fused=True, result_in_8_bits=True),
    "gate/up fp8 blocks": lambda: product(128, 3, 2048, 1536, dtype="fp8-blocks", fused=True, result_in_8_bits=True),
    "gate/up fp16 K-major": lambda: product(8, 300, 2880, 5760, dtype="fp16", fused=True, transposed=True),
    "gate/up with bias": lambda: (
        lambda lhs, rhs, sizes, bias: grouped_gate_up(
            lhs, rhs, sizes, bias=bias, activation="swigluoai", backend="pallas_gpu"
        ),
        array("bfloat16", 1000, 1024),
        array("bfloat16", 8, 1024, 768),
        array("int32", 8),
        array("bfloat16", 8, 768),
    ),
    "gate/up relu2": lambda: (
        lambda lhs, rhs, sizes: grouped_gate_up(lhs, rhs, sizes, activation="relu2", backend="pallas_gpu"),
        array("bfloat16", 1000, 1024),
        array("bfloat16", 8, 1024, 768),
        array("int32", 8),
    ),
    "gradients": lambda: (
        lambda lhs, rhs, sizes: gradients(
            lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, backend="pallas_gpu"), lhs, rhs
        ),
        array("bfloat16", 8 * 4096, 7168),
        array("bfloat16", 8, 7168, 4096),
        array("int32", 8),
    ),
    "gradients in fp8": lambda: of_columns(128, 2048, 2048, 1536, dtype="float8_e4m3fn", out_dtype="bfloat16"),
    "gradients in fp8 to float32": lambda: of_columns(32, 1024, 7168, 4096, dtype="float8_e5m2", out_dtype="float32"),
    "gradients onto sums": lambda: onto_sums(128, 512, 2048, 1536),
    "gradients of many rows onto sums": lambda: onto_sums(16, 2048, 2048, 1408),
    "gradients onto sums in bf16": lambda: onto_sums(128, 512, 2048, 1536, dtype="bfloat16"),
    "gradients of combine": lambda: (
        lambda rows, weights, plan: gradients(
            lambda rows, weights: combine(rows, plan, weights, backend="pallas_gpu"), rows, weights
        ),
        array("bfloat16", 2048, 1024),
        array("float32", 512, 4),
        Plan(array("int32", 2048), array("int32", 512, 4), array("int32", 8), array("int32", 8), array("int32")),
    ),
    "dense network, 16 rows": lambda: dense(16, 2048, 4096),
    "dense network, 64 rows": lambda: dense(64, 2048, 4096),
    "dense network, 128 rows": lambda: dense(128, 768, 3072, dtype="float16"),
    "dense network, 256 rows": lambda: dense(256, 2048, 4096),
    "dense network, 512 rows": lambda: dense(512, 2048, 4096),
    "dense network, 1024 rows": lambda: dense(1024, 2048, 4096),
    "rms_norm gradients": lambda: (
        lambda x, weight, residual: gradients(
            lambda *args: sum(rms_norm(*args[:2], residual=args[2], backend="pallas_gpu")), x, weight, residual
        ),
        array("bfloat16", 4096, 7168),
        array("float32", 7168),
        array("bfloat16", 4096, 7168),
    ),
    "rms_norm 8192": lambda: (
        lambda x, weight: gradients(lambda *args: rms_norm(*args, backend="pallas_gpu"), x, weight),
        array("float32", 4096, 8192),
        array("float32", 8192),
    ),
    "rms_norm long": lambda: (
        lambda x, weight: rms_norm_in_8_bits(x, weight, scaling="per_row", backend="pallas_gpu").in_8_bits,
        array("bfloat16", 4096, 16384),
        array("float32", 16384),
    ),
    "rms_norm 2880": lambda: (
        lambda x, weight: rms_norm_in_8_bits(x, weight, scaling="per_row", dtype="int8", backend="pallas_gpu"),
        array("float16", 4096, 2880),
        array("float32", 2880),
    ),
    "rms_norm in blocks": lambda: (
        lambda x, weight, residual: rms_norm_in_8_bits(x, weight, residual=residual, backend="pallas_gpu"),
        array("bfloat16", 4096, 7168),
        array("float32", 7168),
        array("bfloat16", 4096, 7168),
    ),
    "weights in both layouts": lambda: (
        lambda weights: quantize_transpose(weights, backend="pallas_gpu"),
        array("bfloat16", 128, 2048, 1536),
    ),
    "weights in float32": lambda: (
        lambda weights: quantize_transpose(weights, "float8_e5m2", backend="pallas_gpu"),
        array("float32", 32, 7168, 4096),
    ),
    "weights K-major": lambda: (
        lambda weights: quantize_transpose(weights, n_last=False, backend="pallas_gpu")[0],
        array("float16", 128, 768, 2048),
    ),
    "columns of tokens": lambda: columns("bfloat16", 4096, 7168, 32768),
    "columns": lambda: columns("float16", 32768, 2048),
    "columns in float32": lambda: columns("float32", 32768, 2048),
    "columns 1408": lambda: columns("bfloat16", 32768, 1408),
    "rows": lambda: (lambda x: quantize_rows(x, backend="pallas_gpu"), array("bfloat16", 32768, 2048)),
    "rows in float32": lambda: (
        lambda x: quantize_rows(x, "float8_e5m2", backend="pallas_gpu"),
        array("float32", 4099, 7168),
    ),
    "rows in float16": lambda: (lambda x: quantize_rows(x, backend="pallas_gpu"), array("float16", 1, 7168)),
    "gated activation": lambda: (
        lambda *args: expert_activation(*args, "silu"),
        array("bfloat16", 32768, 1536),
        array("bfloat16", 32768, 768),
        array("float32", 32768),
    ),
    "gated activation in float32": lambda: (
        lambda *args: expert_activation(*args, "gelu", limit=7.0),
        array("float32", 4099, 4096),
        array("float32", 4099, 2048),
        array("float32", 4099),
    ),
    "gated activation with columns": lambda: activation_with_columns("silu", "float8_e5m2"),
    "gated activation with columns, limited": lambda: activation_with_columns("swigluoai", "float8_e4m3fn", limit=7.0),
    "gated activation 2880": lambda: (
        lambda h, dout: jax.vjp(
            functools.partial(gated_activation, activation="swigluoai", activation_limit=7.0, backend="pallas_gpu"),
            h,
        )[1](dout),
        array("bfloat16", 4099, 5760),
        array("bfloat16", 4099, 2880),
    ),
    "training in fp8": lambda: training_step(
        precision="w8a8", quantization=Quantization(gradient_dtype="float8_e4m3fn")
    ),
    "early decode fp8": lambda: early(product(8, 48, 7168, 2048, dtype="fp8"), "smem", 1.0, 1.0),
    "early decode": lambda: early(product(8, 48, 7168, 2048, dtype="bf16"), "l2", 0.0, 0.5),
    "early gate/up fp8 to fp8": lambda: early(
        product(8, 48, 7168, 4096, dtype="fp8", fused=True, result_in_8_bits=True), "smem", 0.5, 0.5
    ),
    "early gate/up fp8 blocks": lambda: early(
        product(128, 3, 2048, 1536, dtype="fp8-blocks", fused=True, result_in_8_bits=True), "smem", 1.0, 1.0
    ),
    "early prefill fp8": lambda: early(product(8, 4096, 7168, 4096, dtype="fp8"), "pdl", 0.5),
    "early rms_norm": lambda: early(
        (
            lambda x, weight: rms_norm_in_8_bits(x, weight, backend="pallas_gpu").in_8_bits,
            array("bfloat16", 16, 4096),
            array("float32", 4096),
        ),
        "smem",
        1.0,
        1.0,
    ),
    "experts in fp8": lambda: (
        lambda *args: fused_experts(*args, quantization=Quantization()),
        array("bfloat16", 384, 7168),
        array("bfloat16", 8, 4096, 7168),
        array("bfloat16", 8, 7168, 2048),
        array("float32", 384, 1),
        array("int32", 384, 1),
    ),
    "serving in fp8": lambda: serving(64),
    "choice within groups": lambda: (
        lambda *scores: ranked_top_k(*scores, 8, groups=Groups(8, 4, 2), normalize=True, backend="pallas_gpu"),
        *(array("float32", 64, 256),) * 2,
    ),
    "tokens rounded as they are copied": lambda: (
        lambda x, plan: dispatch(ToRound(x, "float8_e4m3fn"), plan, backend="pallas_gpu"),
        array("bfloat16", 256, 2048),
        abstract_plan(256, 8),
    ),
    "eight tokens in fp8": lambda: serving(8),
    "experts of one token by row": lambda: (
        lambda residual, *args: routed_mlp(
            *args, residual=residual, activation="swigluoai", activation_limit=7.0, backend="pallas_gpu"
        ),
        array("bfloat16", 1, 2880),
        QTensor(array("float8_e4m3fn", 1, 2880), array("float32", 1, 1)),
        array("float32", 1, 4),
        array("int32", 1, 4),
        QTensor(array("float8_e4m3fn", 128, 5760, 2880), array("float32", 128, 5760, 1)),
        QTensor(array("float8_e4m3fn", 128, 2880, 2880), array("float32", 128, 2880, 1)),
    ),
    "one row": lambda: of_few_rows(1, "float32"),
    "one row in bf16": lambda: of_few_rows(1, "bfloat16"),
    "eight rows": lambda: of_few_rows(8, "float32"),
    "four rows in bf16": lambda: of_few_rows(4, "bfloat16"),
    "eight rows, many columns": lambda: of_few_rows(8, "float32", 7168, 1024),
    "training step": training_step,
}


def exchange(mesh: Mesh) -> Case:
    """Rows in 8 bits to their experts' chips and back, by their routes."""

    def on_chip(x: jax.Array, ids: jax.Array) -> jax.Array:
        by_expert = make_plan(ids, 64, backend="pallas_gpu")
        routes, _ = make_routes(ids, by_expert, 2048, mesh.axis_names, backend="pallas_gpu")
        sent, move = (
            quantize(x, "float8_e4m3fn", scaling="per_row"),
            functools.partial(all_to_all, axes=mesh.axis_names, backend="pallas_gpu"),
        )
        rows = dequantize(move(sent, routes, 2048, plan=unsorted_plan(ids)), x.dtype)
        return move(rows, routes.back, ids.size)

    split = PartitionSpec(mesh.axis_names)
    over_chips = jax.shard_map(on_chip, mesh=mesh, in_specs=split, out_specs=split)
    return over_chips, array("bfloat16", 256, 7168), array("int32", 256, 8)


OVER_TWO_CHIPS: dict[str, Callable[[Mesh], Case]] = {"exchange": exchange}


def work(job: dict) -> dict:
    """For each case, the kernels in it and what they spill, or why it does not compile."""
    one, two = (
        topologies.get_topology_desc("h200", platform="cuda", target_config=TARGET, topology=f"1x1x{chips}").devices
        for chips in (1, 2)
    )
    answers = {}
    for name in job["cases"]:
        if name in OVER_TWO_CHIPS:
            mesh, split = Mesh(np.array(two), ("expert",)), PartitionSpec("expert")
            function, *shapes = OVER_TWO_CHIPS[name](mesh)
        else:
            mesh, split = Mesh(np.array(one), ("expert",)), PartitionSpec()
            function, *shapes = CASES[name]()
        shapes = jax.tree.map(functools.partial(placed, sharding=NamedSharding(mesh, split)), shapes)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MOSAIC_GPU_DUMP_TO"] = folder
            try:
                with targeting(get_chip("h200")):
                    jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
                answers[name] = kernels_in(Path(folder))
            except Exception as error:
                answers[name] = describe(error, 400)
    return answers


def kernels_in(folder: Path) -> list[str]:
    """The kernels of which the assembler has reported, each with the bytes of a thread that registers do not hold."""
    found = set()
    for path in folder.glob("*.ptxas"):
        name = re.sub(r"_\d+$", "", path.stem)
        spilled = max(int(size) for size in re.findall(r"(\d+) bytes spill stores", path.read_text()))
        found.add(f"{name} spills {spilled} bytes" if spilled > NEGLIGIBLE_SPILL else name)
    return sorted(found)


if __name__ == "__main__":
    gc.disable()  # it traces, compiles and ends
    serve(work)

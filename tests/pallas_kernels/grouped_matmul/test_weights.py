"""Weights that a product rounds: in which layouts, by which kernel, and that nobody transposes or widens them."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.grouped_matmul.weights import in_one_pass
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.quantize import Quantization
from tests.helpers import normal, relative_error, same_bits
from tests.pallas_kernels.kernels_gpu import interpreted

IN_8_BITS = Quantization(gradient_dtype="float8_e5m2")
M, K, N, G = 64, 128, 256, 2
SIZES = jnp.array([15, 12], jnp.int32)


def problem(rng, dtype="bfloat16", transposed=False):
    rhs = (normal(rng, G, K, N) / K**0.5).astype(dtype)
    return normal(rng, M, K, dtype=dtype), rhs.mT if transposed else rhs


def loss(lhs, rhs, function=grouped_matmul, quantization=IN_8_BITS, **options):
    return (function(lhs, rhs, SIZES, quantization=quantization, **options).astype(jnp.float32) ** 2).sum()


def lowered_for_cuda(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def as_large_as_weights(text, operation):
    """The lines of `operation` whose result is as large as the weights."""
    lines = [line for line in text.splitlines() if f"stablehlo.{operation}" in line]
    shapes = [re.findall(r"tensor<((?:\d+x)+)", line.rpartition(":")[2])[-1:] for line in lines]
    sizes = [functools.reduce(lambda a, b: a * int(b), shape[0].split("x")[:-1], 1) if shape else 0 for shape in shapes]
    return [line for line, size in zip(lines, sizes, strict=True) if size >= G * K * N]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("function", [grouped_matmul, grouped_gate_up])
@pytest.mark.quick("grouped_matmul-transposed")
def test_gradients_in_8_bits_neither_widen_nor_transpose_weights(rng, function, transposed):
    operands = problem(rng, transposed=transposed)
    gradient = jax.grad(functools.partial(loss, function=function, transpose_rhs=transposed), argnums=(0, 1))
    text = lowered_for_cuda(gradient, *operands)
    assert "quantize_transpose" in text
    # The gradient of the weights is transposed where they are, as there is no other way to write it.
    assert len(as_large_as_weights(text, "transpose")) <= transposed
    assert not [line for line in as_large_as_weights(text, "convert") if "f8E4M3FN" in line]


@pytest.mark.parametrize(
    "function",
    [loss, jax.grad(functools.partial(loss, quantization=Quantization()), argnums=(0, 1))],
    ids=["serving", "gradients as they come"],
)
def test_one_layout_is_written_where_one_is_taken(rng, function):
    operands = problem(rng)
    [call] = re.findall(r"custom_call @.*quantize_transpose.*", lowered_for_cuda(function, *operands))
    results = call.rpartition("->")[2]
    assert f"tensor<{G * N}x{K}xf8E4M3FN>" in results
    assert f"tensor<{G * K // 2}x{2 * N}xf8E4M3FN>" not in results


@pytest.mark.slow
def test_gradients_interpreted(rng):
    def gradients(lhs, rhs, **options):
        run = functools.partial(loss, function=grouped_gate_up, transpose_rhs=True, **options)
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(lhs, rhs)

    operands = problem(rng, transposed=True)
    with interpreted(), single_view(True):
        got = gradients(*operands, backend="pallas_gpu")
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(gradients(*operands)), strict=True):
        assert relative_error(ours, theirs) < 0.02


def test_gradients_under_transformations(rng):
    lhs, rhs = problem(rng, "float32")
    gradient = jax.grad(loss, argnums=(0, 1))
    plain = jax.jit(gradient)(lhs, rhs)
    checkpointed = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(lhs, rhs)
    assert same_bits(checkpointed, plain)
    [mapped, others] = jax.jit(jax.vmap(gradient))(jnp.stack([lhs, lhs]), jnp.stack([rhs, 2 * rhs]))
    assert same_bits((mapped[0], others[0]), plain)

    def twice(lhs, rhs):
        return jax.lax.scan(lambda total, _: (total + loss(lhs, rhs), None), jnp.float32(0), length=2)[0]

    scanned = jax.jit(jax.grad(twice, argnums=(0, 1)))(lhs, rhs)
    assert all(relative_error(a, 2 * b) < 1e-6 for a, b in zip(scanned, plain, strict=True))


def test_gradients_in_shard_map(rng):
    """Rows are split, weights are whole: what they are rounded to varies as nothing does."""
    lhs, rhs = problem(rng, "float32")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("x"), PartitionSpec()), out_specs=PartitionSpec()
    )
    def total(lhs, rhs):
        return jax.lax.psum(loss(lhs, rhs), "x")

    got = jax.jit(jax.grad(total, argnums=(0, 1)))(lhs, rhs)
    halves = [jax.jit(jax.grad(loss, argnums=(0, 1)))(half, rhs) for half in jnp.split(lhs, 2)]
    assert relative_error(got[0], jnp.concatenate([half[0] for half in halves])) < 1e-6
    assert relative_error(got[1], halves[0][1] + halves[1][1]) < 1e-6


def test_which_weights_are_rounded_in_one_pass():
    weights = jax.ShapeDtypeStruct((2, 128, 256), jnp.bfloat16)
    assert in_one_pass(weights, Quantization())
    assert not in_one_pass(weights, Quantization("int8"))
    assert not in_one_pass(weights, Quantization(rhs_scaling="per_channel"))
    assert not in_one_pass(jax.ShapeDtypeStruct((2, 128, 200), jnp.bfloat16), Quantization())
    assert not in_one_pass(jax.ShapeDtypeStruct((0, 128, 256), jnp.bfloat16), Quantization())

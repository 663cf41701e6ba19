"""The two products of an expert in training: what lies between them, forward and backward, is one kernel each way."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.grouped_matmul import (
    GATE_UP_NAME,
    grouped_gate_up,
    grouped_gate_up_in_8_bits,
    grouped_gate_up_rounded,
    grouped_matmul,
)
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.quantize import Quantization, dequantize
from tests.helpers import LIMIT, normal, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import (
    dense_drhs,
    dense_matmul,
    gated,
    gated_gradient,
    limit_beside_8_bits,
    quantized,
    values,
)
from tests.pallas_kernels.kernels_gpu import interpreted

backend = every_backend("grouped_matmul")

M, H, WIDTH, G = 64, 384, 128, 2
SIZES = jnp.array([31, 22], jnp.int32)
IN_8_BITS = Quantization(gradient_dtype="float8_e4m3fn")


def problem(rng, dtype="bfloat16"):
    """Rows, the weights of both products, and a cotangent; rows past the sum of the groups are NaN."""
    w1, w2 = normal(rng, G, H, 2 * WIDTH) / H**0.5, normal(rng, G, WIDTH, H) / WIDTH**0.5
    x, dy = (normal(rng, M, H).at[int(SIZES.sum()) :].set(jnp.nan) for _ in range(2))
    return tuple(a.astype(dtype) for a in (x, w1, w2, dy))


def mlp(x, w1, w2, quantization=IN_8_BITS, **options):
    """Both products, as an expert layer has them."""
    settings = {"quantization": quantization, **options}
    gate_up = grouped_gate_up if quantization is None else grouped_gate_up_rounded
    h = gate_up(x, w1, SIZES, **settings)
    return grouped_matmul(h, w2, SIZES, preferred_element_type=x.dtype, **settings)


def with_gradients(x, w1, w2, dy, wrap=lambda f: f, **options):
    y, pull = jax.vjp(wrap(functools.partial(mlp, **options)), x, w1, w2)
    return y, pull(dy)


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def between_the_products(text, operation):
    """The lines of `operation` that have a result as large as a row's [I] or [2I], of all rows."""
    lines = [line for line in text.splitlines() if f"stablehlo.{operation}" in line]
    shapes = [re.findall(r"tensor<((?:\d+x)+)", line.rpartition(":")[2])[-1:] for line in lines]
    sizes = [np.prod([int(n) for n in shape[0].split("x")[:-1]]) if shape else 0 for shape in shapes]
    return [line for line, size in zip(lines, sizes, strict=True) if size in (M * WIDTH, 2 * M * WIDTH)]


def kernels(text, name):
    return [line for line in text.splitlines() if "custom_call @" in line and f"{name}_mosaic_gpu" in line]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.quick("xla-False")
def test_gradients_pass_the_roundings(backend, rng, has_bias):
    """Each gradient is that of the products of what was rounded, in float64."""
    x, w1, w2, dy = problem(rng, "float32")
    x, dy = (jnp.nan_to_num(a) for a in (x, dy))
    bias = normal(rng, G, 2 * WIDTH) if has_bias else None
    quantization = Quantization()

    @jax.jit
    def run(x, w1, w2):
        def function(x, w1, w2):
            h = grouped_gate_up_rounded(x, w1, SIZES, bias=bias, quantization=quantization, backend=backend)
            return grouped_matmul(h, w2, SIZES, quantization=quantization, backend=backend), h

        y, pull, h = jax.vjp(function, x, w1, w2, has_aux=True)
        return h, y, pull(dy)

    h, y, (dx, dw1, dw2) = run(x, w1, w2)
    qx, qw1, qw2 = quantized(x, scaling="1x128"), quantized(w1, scaling="128x128"), quantized(w2, scaling="128x128")
    pre = dense_matmul(qx, qw1, SIZES, bias)
    owned = np.arange(M) < int(SIZES.sum())
    assert relative_error(values(h.in_8_bits)[owned], gated(*np.split(pre, 2, 1), "silu")[owned]) < 0.05
    assert same_bits(h.array, jax.jit(dequantize)(h.in_8_bits))
    limit = limit_beside_8_bits(backend)
    assert relative_error(y, dense_matmul(h.in_8_bits, qw2, SIZES)) < max(limit, 1e-3)
    dh = dense_matmul(dy, values(qw2).swapaxes(1, 2), SIZES)
    dpre = gated_gradient(pre, dh, "silu")
    assert relative_error(dx, dense_matmul(dpre, values(qw1).swapaxes(1, 2), SIZES)) < limit
    assert relative_error(dw1, dense_drhs(qx, dpre, SIZES, G)) < limit
    assert relative_error(dw2, dense_drhs(h.in_8_bits, dy, SIZES, G)) < limit


@pytest.mark.quick("xla")
def test_without_gradients_it_is_the_product_in_8_bits(backend, rng):
    x, w1, *_ = problem(rng)
    options = {"quantization": Quantization(), "backend": backend}
    got = jax.jit(functools.partial(grouped_gate_up_rounded, **options))(x, w1, SIZES)
    assert same_bits(got.in_8_bits, jax.jit(functools.partial(grouped_gate_up_in_8_bits, **options))(x, w1, SIZES))
    assert same_bits(got.array, jax.jit(lambda q: dequantize(q, "bfloat16"))(got.in_8_bits))


@pytest.mark.parametrize("quantization", [None, Quantization(), IN_8_BITS], ids=["bf16", "w8", "w8 dx"])
@pytest.mark.quick("w8 dx")
def test_nothing_is_left_to_xla_between_the_products(rng, quantization):
    operands = problem(rng)
    text = lowered(functools.partial(with_gradients, quantization=quantization), *operands)
    [forward], [backward] = kernels(text, "gated_activation"), kernels(text, "gated_activation_pullback")
    for operation in ("concatenate", "exponential", "logistic", "divide", "multiply", "convert", "transpose"):
        assert not between_the_products(text, operation)
    array, dh = f"tensor<{M}x{WIDTH}xbf16>", f"tensor<{M}x{2 * WIDTH}xbf16>"
    assert array in forward.rpartition("->")[2]
    assert dh in backward.rpartition("->")[2]
    rounds_forward, rounds_backward = ("f8E4M3FN" in line.rpartition("->")[2] for line in (forward, backward))
    assert rounds_forward == (quantization is not None)
    assert rounds_backward == (quantization is IN_8_BITS)
    if quantization is IN_8_BITS:  # scales lie as products read them
        assert f"tensor<{2 * WIDTH // 128}x{M}xf32>" in backward.rpartition("->")[2]


POLICIES = {"nothing": None, "gate/up": checkpoint_policies.save_only_these_names(GATE_UP_NAME)}


@pytest.mark.parametrize("kept", POLICIES)
@pytest.mark.slow
def test_checkpoint(rng, kept):
    operands = problem(rng, "float32")
    plain = jax.jit(with_gradients)(*operands)
    wrap = functools.partial(jax.checkpoint, policy=POLICIES[kept])
    assert_alike(jax.jit(functools.partial(with_gradients, wrap=wrap))(*operands), plain)


@pytest.mark.parametrize("kept", POLICIES)
@pytest.mark.slow
def test_what_is_computed_again(rng, kept):
    wrap = functools.partial(jax.checkpoint, policy=POLICIES[kept])
    text = lowered(functools.partial(with_gradients, wrap=wrap), *problem(rng))
    calls = kernels(text, "gated_activation")
    assert len(kernels(text, "grouped_matmul")) == (5 if kept == "nothing" else 4)
    # Of the activation, no more is computed again than is used again: the array.
    assert ["f8E4M3FN" in call.rpartition("->")[2] for call in calls] == [True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.slow
def test_under_transformations(rng, dtype):
    x, w1, w2, dy = problem(rng, dtype)
    plain = jax.jit(with_gradients)(x, w1, w2, dy)
    mapped = jax.jit(jax.vmap(with_gradients))(*(jnp.stack([a, a]) for a in (x, w1, w2, dy)))
    assert_alike(jax.tree.map(lambda a: a[1], mapped), plain)

    def twice(x, w1, w2):
        def layer(total, _):
            return total + mlp(x, w1, w2), None

        return jax.lax.scan(layer, jnp.zeros_like(dy), length=2)[0]

    _, pull = jax.vjp(twice, x, w1, w2)
    assert_alike(jax.jit(pull)(dy), [2 * a for a in plain[1]], 1e-2 if dtype == "bfloat16" else 1e-6)


def test_in_shard_map(rng):
    """Rows are split, weights are whole."""
    x, w1, w2, dy = (jnp.nan_to_num(a) for a in problem(rng, "float32"))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = PartitionSpec("x"), PartitionSpec()

    def product(x, w1, w2, dy):
        sizes = jnp.array([15, 12], jnp.int32)
        h = grouped_gate_up_rounded(x, w1, sizes, quantization=IN_8_BITS)
        return (grouped_matmul(h, w2, sizes, quantization=IN_8_BITS) * dy).sum()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=whole)
    def total(*args):
        return jax.lax.psum(product(*args), "x")

    got = jax.jit(jax.grad(total, (0, 1, 2)))(x, w1, w2, dy)
    gradient = jax.jit(jax.grad(product, (0, 1, 2)))
    one, other = (gradient(a, w1, w2, b) for a, b in zip(jnp.split(x, 2), jnp.split(dy, 2), strict=True))
    assert_alike(got, (jnp.concatenate([one[0], other[0]]), one[1] + other[1], one[2] + other[2]))


@pytest.mark.parametrize("argument", ["x", "w1", "w2"])
@pytest.mark.quick("w1")
def test_gradients_of_one_alone(rng, argument):
    x, w1, w2, dy = problem(rng, "float32")
    operands = {"x": x, "w1": w1, "w2": w2}
    _, expected = jax.jit(with_gradients)(x, w1, w2, dy)

    def of(operand):
        return mlp(**operands | {argument: operand})

    (got,) = jax.jit(lambda operand: jax.vjp(of, operand)[1](dy))(operands[argument])
    assert_alike(got, dict(zip(operands, expected, strict=True))[argument])


@pytest.mark.parametrize("quantization", [None, IN_8_BITS], ids=["bf16", "w8 dx"])
@pytest.mark.slow
def test_gradients_interpreted(rng, quantization):
    operands = problem(rng)
    run = functools.partial(with_gradients, quantization=quantization)
    with interpreted(), single_view(True):
        got = jax.jit(functools.partial(run, backend="pallas_gpu"))(*operands)
    owned = int(SIZES.sum())
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(run)(*operands)), strict=True):
        if ours.shape[0] == M:
            ours, theirs = ours[:owned], theirs[:owned]
        assert relative_error(ours, theirs) < (LIMIT["bfloat16"] if quantization is None else 0.02)


def assert_alike(got, expected, limit=1e-6):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < limit

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.quantize import QTensor, Quantization
from tests.helpers import LIMIT, float64, normal, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import (
    dense_dbias,
    dense_drhs,
    dense_gate_up,
    dense_matmul,
    gated_gradient,
    limit_beside_8_bits,
    limit_in_8_bits,
    owned,
    patterns_of_empty_groups,
    quantized,
    random_sizes,
    values,
)
from tests.pallas_kernels.kernels_tpu import is_interpreted, lower_for_tpu

backend = every_backend("grouped_matmul")

M, K, N, G = 70, 33, 22, 8
SINGLE = LIMIT["float32"]


@functools.cache
def value_and_gradients(function, checkpoint=False, **options):
    """(out, (dlhs, drhs, dbias)) for a given cotangent, compiled once for all tests with the same options."""

    def run(lhs, rhs, bias, sizes, dout, group_offset=0):
        def product(lhs, rhs, bias):
            return function(lhs, rhs, sizes, bias=bias, group_offset=group_offset, **options)

        out, pullback = jax.vjp(jax.checkpoint(product) if checkpoint else product, lhs, rhs, bias)
        return out, pullback(dout)

    return jax.jit(run)


def problem(rng, m=M, k=K, n=N, g=G, *, width=None, dtype=jnp.float32):
    """lhs, rhs, bias and a cotangent [M, width]; n columns unless `width` says otherwise."""
    rhs = (normal(rng, g, k, n) / k**0.5).astype(dtype)
    dout = normal(rng, m, width or n, dtype=dtype)
    return normal(rng, m, k, dtype=dtype), rhs, normal(rng, g, n, dtype=dtype), dout


def dense_gradients(lhs, rhs, sizes, dout, offset=0):
    """(dlhs, drhs, dbias) of a plain grouped product, in float64."""
    num_groups = values(rhs).shape[0]
    dlhs = dense_matmul(dout, values(rhs).swapaxes(1, 2), sizes, group_offset=offset)
    drhs = dense_drhs(lhs, dout, sizes, num_groups, offset)
    return dlhs, drhs, dense_dbias(dout, sizes, num_groups, offset)


def dense_gate_up_gradients(lhs, rhs, bias, sizes, dout, activation="silu", limit=None):
    h = dense_matmul(lhs, rhs, sizes, bias)
    return dense_gradients(lhs, rhs, sizes, gated_gradient(h, float64(dout), activation, limit))


def assert_all_close(gradients, references, limit):
    for name, gradient, reference in zip(("lhs", "rhs", "bias"), gradients, references, strict=True):
        assert relative_error(gradient, reference) < limit, f"gradient of {name}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.quick("xla-float32", "pallas_gpu-float32")
def test_gradients_of_the_product(backend, rng, dtype):
    lhs, rhs, bias, dout = problem(rng, dtype=dtype)
    sizes = random_sizes(rng, G, M)
    _, gradients = value_and_gradients(grouped_matmul, backend=backend)(lhs, rhs, bias, sizes, dout)
    assert [g.dtype for g in gradients] == [dtype] * 3
    assert_all_close(gradients, dense_gradients(lhs, rhs, sizes, dout), LIMIT[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.quick("xla-bfloat16", "pallas_gpu-bfloat16")
def test_gradients_of_the_fused_product(backend, rng, dtype):
    lhs, rhs, bias, dout = problem(rng, dtype=dtype, width=N // 2)
    sizes = random_sizes(rng, G, M)
    out, gradients = value_and_gradients(grouped_gate_up, backend=backend)(lhs, rhs, bias, sizes, dout)
    # Pre-activations, and their cotangent, are rounded to the dtype of the result on their way.
    assert relative_error(out, dense_gate_up(lhs, rhs, sizes, bias)) < 2 * LIMIT[dtype]
    assert_all_close(gradients, dense_gate_up_gradients(lhs, rhs, bias, sizes, dout), 2 * LIMIT[dtype])


@pytest.mark.parametrize("rows", [256, 301, 1000])
@pytest.mark.quick("xla-301", "xla-256")
def test_gradients_on_aligned_shapes(backend, rng, rows):
    lhs, rhs, bias, dout = problem(rng, rows, 256, 256, 4, dtype=jnp.bfloat16)
    sizes = random_sizes(rng, 4, rows)
    _, gradients = value_and_gradients(grouped_matmul, backend=backend)(lhs, rhs, bias, sizes, dout)
    assert_all_close(gradients, dense_gradients(lhs, rhs, sizes, dout), LIMIT["bfloat16"])


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"])
@pytest.mark.quick("xla-gelu-0.5", "xla-swigluoai-0.5")
def test_gradients_of_every_activation(backend, rng, activation, limit):
    lhs, rhs, bias, dout = problem(rng, width=N // 2)
    sizes = random_sizes(rng, G, M - 6)
    if limit is not None:  # no gradient through what is so near to the clamp's edge that rounding tells the side
        near_edge = np.abs(np.abs(dense_matmul(lhs, rhs, sizes, bias)) - limit) < 1e-4
        dout *= ~np.logical_or(*np.split(near_edge, 2, axis=1))
    options = dict(activation=activation, activation_limit=limit)
    _, gradients = value_and_gradients(grouped_gate_up, backend=backend, **options)(lhs, rhs, bias, sizes, dout)
    assert_all_close(gradients, dense_gate_up_gradients(lhs, rhs, bias, sizes, dout, activation, limit), SINGLE)


@pytest.mark.parametrize("share", ["some", "all"])
@pytest.mark.quick("xla-all", "pallas_gpu-*")
def test_every_pattern_of_empty_groups(backend, rng, share):
    lhs, rhs, bias, dout = problem(rng)
    for filled in patterns_of_empty_groups(rng, G, share):
        used = int(rng.integers(M // 2, M + 1)) if any(filled) else 0
        sizes = rng.multinomial(used, np.array(filled) / sum(filled)) if used else np.zeros(G, int)
        run = value_and_gradients(grouped_matmul, backend=backend)
        _, gradients = run(lhs, rhs, bias, jnp.asarray(sizes, jnp.int32), dout)
        assert_all_close(gradients, dense_gradients(lhs, rhs, sizes, dout), SINGLE)
        assert not np.asarray(gradients[1])[sizes == 0].any()
        assert not np.asarray(gradients[2])[sizes == 0].any()


@pytest.mark.parametrize(("shape", "dtype"), [((M, K, N), "float32"), ((M, 200, 192), "bfloat16")], ids=str)
@pytest.mark.parametrize("used", [0, 1, 37, M - 1])
@pytest.mark.quick("xla-37-(70, 200, 192)-bfloat16", "xla-37-(70, 33, 22)-float32", "pallas_gpu*")
def test_nan_in_unowned_rows_reaches_no_gradient(backend, rng, used, shape, dtype):
    lhs, rhs, bias, dout = problem(rng, *shape, dtype=dtype)
    sizes = random_sizes(rng, G, used)
    run = value_and_gradients(grouped_matmul, backend=backend)
    _, gradients = run(lhs.at[used:].set(jnp.nan), rhs, bias, sizes, dout.at[used:].set(jnp.nan))
    assert_all_close(gradients, dense_gradients(lhs, rhs, sizes, dout), LIMIT[dtype])
    assert not np.asarray(gradients[0])[used:].any()


@pytest.mark.quick("xla", "pallas_gpu")
def test_nan_in_unowned_rows_of_the_fused_product(backend, rng):
    lhs, rhs, bias, dout = problem(rng, width=N // 2)
    sizes = random_sizes(rng, G, 50)
    run = value_and_gradients(grouped_gate_up, backend=backend)
    _, gradients = run(lhs.at[50:].set(jnp.nan), rhs, bias, sizes, dout.at[50:].set(jnp.nan))
    clean = dout.at[50:].set(0)
    assert_all_close(gradients, dense_gate_up_gradients(lhs, rhs, bias, sizes, clean), SINGLE)


@pytest.mark.quick("xla", "pallas_gpu")
def test_gradients_in_a_window_of_groups(backend, rng):
    lhs, rhs, bias, dout = problem(rng, g=3)
    sizes = jnp.asarray([9, 0, 0, 0, 0, 21, 1, 30], jnp.int32)
    for offset in range(6):
        others = ~owned(M, sizes, 3, offset)[:, None]
        run = value_and_gradients(grouped_matmul, backend=backend)
        poisoned = jnp.where(others, jnp.nan, lhs), rhs, bias, sizes, jnp.where(others, jnp.nan, dout)
        _, gradients = run(*poisoned, jnp.int32(offset))
        assert_all_close(gradients, dense_gradients(lhs, rhs, sizes, dout, offset), SINGLE)


@pytest.mark.quick("xla", "pallas_gpu")
def test_gradients_of_a_transposed_rhs(backend, rng):
    lhs, rhs, bias, dout = problem(rng)
    sizes = random_sizes(rng, G, M)
    run = value_and_gradients(grouped_matmul, backend=backend, transpose_rhs=True)
    _, (dlhs, drhs, dbias) = run(lhs, rhs.mT, bias, sizes, dout)
    assert_all_close((dlhs, drhs.mT, dbias), dense_gradients(lhs, rhs, sizes, dout), SINGLE)


@pytest.mark.quick("xla")
def test_gradients_keep_the_dtype_of_each_operand(backend, rng):
    lhs, rhs, bias, dout = problem(rng)
    lhs, dout = lhs.astype(jnp.bfloat16), dout.astype(jnp.bfloat16)
    sizes = random_sizes(rng, G, M)
    _, gradients = value_and_gradients(grouped_matmul, backend=backend)(lhs, rhs, bias, sizes, dout)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert_all_close(gradients, dense_gradients(lhs, rhs, sizes, dout), LIMIT["bfloat16"])


@pytest.mark.parametrize("transpose", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(
    "quantization", [Quantization(), Quantization("int8", "per_row", "per_channel")], ids=lambda q: q.dtype
)
@pytest.mark.quick("pallas_tpu-int8-")
def test_gradients_pass_straight_through_the_rounding(backend, rng, quantization, transpose):
    lhs, rhs, bias, dout = problem(rng, 256, 256, 128, 4)
    sizes = random_sizes(rng, 4, 250)
    run = value_and_gradients(grouped_matmul, backend=backend, quantization=quantization, transpose_rhs=transpose)
    _, (dlhs, drhs, dbias) = run(lhs, rhs.mT if transpose else rhs, bias, sizes, dout)
    qlhs = quantized(lhs, quantization.dtype, scaling=quantization.lhs_scaling)
    qrhs = quantized(rhs, quantization.dtype, scaling=quantization.rhs_scaling)
    gradients = dlhs, (drhs.mT if transpose else drhs), dbias
    assert_all_close(gradients, dense_gradients(qlhs, qrhs, sizes, dout), limit_beside_8_bits(backend))


@pytest.mark.parametrize("transpose", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("lhs_scaling", ["1x128", "per_tensor"])
@pytest.mark.quick("xla-1x128-transposed", "pallas_gpu-*")
def test_cotangents_in_8_bits(backend, rng, lhs_scaling, transpose):
    lhs, rhs, bias, dout = problem(rng, 256, 256, 128, 4)
    sizes = random_sizes(rng, 4, 250)
    quantization = Quantization(lhs_scaling=lhs_scaling, gradient_dtype="float8_e5m2")
    run = value_and_gradients(grouped_matmul, backend=backend, quantization=quantization, transpose_rhs=transpose)
    _, (dlhs, drhs, _) = run(lhs, rhs.mT if transpose else rhs, bias, sizes, dout.at[250:].set(jnp.nan))
    clean = dout.at[250:].set(0)
    qlhs = quantized(lhs.at[250:].set(0), scaling=lhs_scaling)
    qrhs, qdout = quantized(rhs, scaling="128x128"), quantized(clean, "float8_e5m2", scaling=lhs_scaling)
    rounded, _, _ = dense_gradients(qlhs, qrhs, sizes, values(qdout))
    exact, weights, _ = dense_gradients(qlhs, qrhs, sizes, clean)
    assert relative_error(dlhs, rounded) < limit_in_8_bits(backend)
    assert relative_error(dlhs, exact) < 0.1
    assert relative_error(drhs.mT if transpose else drhs, weights) < limit_beside_8_bits(backend)


@pytest.mark.quick("xla")
def test_gradients_of_the_fused_product_pass_straight_through(backend, rng):
    lhs, rhs, bias, dout = problem(rng, 256, 256, 256, 4, width=128)
    sizes = random_sizes(rng, 4, 250)
    run = value_and_gradients(grouped_gate_up, backend=backend, quantization=Quantization())
    _, gradients = run(lhs, rhs, bias, sizes, dout)
    qlhs, qrhs = quantized(lhs, scaling="1x128"), quantized(rhs, scaling="128x128")
    limit = limit_beside_8_bits(backend)
    assert_all_close(gradients, dense_gate_up_gradients(qlhs, qrhs, bias, sizes, dout), limit)


@pytest.mark.parametrize("lhs_scaling", ["per_tensor", "1x128"])
@pytest.mark.quick("xla-*")
def test_unowned_rows_stay_out_of_quantised_gradients(backend, rng, lhs_scaling):
    lhs, rhs, bias, dout = problem(rng, 256, 256, 128, 4)
    sizes = random_sizes(rng, 4, 150)
    run = value_and_gradients(grouped_matmul, backend=backend, quantization=Quantization(lhs_scaling=lhs_scaling))
    _, gradients = run(lhs.at[150:].set(jnp.nan), rhs, bias, sizes, dout)
    qlhs, qrhs = quantized(lhs.at[150:].set(0), scaling=lhs_scaling), quantized(rhs, scaling="128x128")
    assert_all_close(gradients, dense_gradients(qlhs, qrhs, sizes, dout), limit_beside_8_bits(backend))


@pytest.mark.quick("xla")
def test_gradient_beside_a_constant_qtensor(backend, rng):
    lhs, rhs, bias, dout = problem(rng, 256, 256, 128, 4)
    sizes = random_sizes(rng, 4, 256)
    qlhs, qrhs = quantized(lhs, scaling="1x128"), quantized(rhs, scaling="128x128")

    @jax.jit
    def run(lhs, rhs, bias):
        def frozen_rhs(lhs, bias):
            return grouped_matmul(lhs, qrhs, sizes, bias=bias, backend=backend)

        def frozen_lhs(rhs, bias):
            return grouped_matmul(qlhs, rhs, sizes, bias=bias, preferred_element_type=jnp.float32, backend=backend)

        dlhs, dbias = jax.vjp(frozen_rhs, lhs, bias)[1](dout)
        drhs, _ = jax.vjp(frozen_lhs, rhs, bias)[1](dout)
        return dlhs, drhs, dbias

    assert_all_close(run(lhs, rhs, bias), dense_gradients(qlhs, qrhs, sizes, dout), SINGLE)


@pytest.mark.quick("xla")
def test_no_gradient_reaches_a_qtensor(backend, rng):
    lhs, rhs, _, _ = problem(rng, 16, 128, 128, 2)
    values, sizes = quantized(rhs, "int8").values, jnp.array([10, 6])

    def loss(scale):
        return grouped_matmul(lhs, QTensor(values, scale), sizes, backend=backend).sum()

    assert not np.asarray(jax.grad(loss)(jnp.ones((2, 1, 1)))).any()


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["float", "fp8"])
@pytest.mark.quick("xla-fp8")
def test_checkpoint(backend, rng, quantization):
    lhs, rhs, bias, dout = problem(rng, 128, 128, 256, 4, width=128)
    sizes = random_sizes(rng, 4, 120)
    options = dict(backend=backend, quantization=quantization)
    if is_interpreted(backend):
        recomputed = value_and_gradients(grouped_gate_up, checkpoint=True, **options)
        assert "tpu_custom_call" in lower_for_tpu(recomputed, lhs, rhs, bias, sizes, dout).as_text()
        return
    stored = value_and_gradients(grouped_gate_up, **options)(lhs, rhs, bias, sizes, dout)
    recomputed = value_and_gradients(grouped_gate_up, checkpoint=True, **options)(lhs, rhs, bias, sizes, dout)
    assert relative_error(recomputed[0], stored[0]) < 1e-6
    assert_all_close(recomputed[1], stored[1], 1e-6)


@pytest.mark.quick("xla", "pallas_gpu")
def test_same_inputs_same_bits(backend, rng):
    lhs, rhs, bias, dout = problem(rng, 256, 256, 256, 4, dtype=jnp.bfloat16)
    sizes = random_sizes(rng, 4, 256)
    run = value_and_gradients(grouped_matmul, backend=backend)
    first = run(lhs, rhs, bias, sizes, dout)
    assert all(same_bits(first, run(lhs, rhs, bias, sizes, dout)) for _ in range(3))


@pytest.mark.parametrize("function", [grouped_matmul, grouped_gate_up])
@pytest.mark.quick("pallas_tpu-grouped_gate_up", "xla-grouped_matmul", "pallas_gpu*")
def test_no_rows(backend, function):
    def loss(lhs, rhs, bias):
        return function(lhs, rhs, jnp.zeros(2, jnp.int32), bias=bias, backend=backend).sum()

    operands = jnp.zeros((0, 4)), jnp.ones((2, 4, 6)), jnp.ones((2, 6))
    gradients = jax.grad(loss, argnums=(0, 1, 2))(*operands)
    assert [g.shape for g in gradients] == [x.shape for x in operands]
    assert not any(np.asarray(g).any() for g in gradients)

import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantize import QTensor, Quantization, dequantize
from tests.helpers import LIMIT, relative_error
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import (
    dense_gate_up,
    dense_matmul,
    gate_up,
    limit_beside_8_bits,
    limit_in_8_bits,
    matmul,
    operands,
    owned,
    quantized,
    random_sizes,
)

backend = every_backend("grouped_matmul")

# lhs scaling (None: BF16), rhs scaling, lhs dtype, rhs dtype
QUANTIZED = [
    ("1x128", "128x128", "float8_e4m3fn", "float8_e4m3fn"),
    ("1x128", "per_channel", "float8_e5m2", "float8_e4m3fn"),
    ("per_row", "128x128", "float8_e4m3fn", "float8_e4m3fn"),
    ("per_tensor", "per_channel", "float8_e4m3fn", "float8_e5m2"),
    ("per_row", "per_tensor", "float8_e4m3fn", "float8_e4m3fn"),
    ("per_row", "per_channel", "float8_e4m3fn", "float8_e4m3fn"),
    ("per_row", "per_channel", "int8", "int8"),
    ("per_tensor", "per_tensor", "float8_e5m2", "float8_e4m3fn"),
    ("1x128", "1x128", "float8_e4m3fn", "float8_e5m2"),
    ("128x128", "per_row", "float8_e5m2", "float8_e5m2"),
    ("per_channel", "128x128", "int8", "int8"),
    (None, "128x128", None, "float8_e4m3fn"),
    (None, "per_channel", None, "int8"),
    ("1x128", None, "float8_e4m3fn", None),
]


@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize(("lhs_scaling", "rhs_scaling", "lhs_dtype", "rhs_dtype"), QUANTIZED)
@pytest.mark.parametrize("k_major", [False, True], ids=["", "k_major"])
@pytest.mark.quick(
    "pallas_tpu--1x128-128x128-float8_e4m3fn-float8_e4m3fn-gate_up",
    "xla-k_major-per_row-per_channel-float8_e4m3fn-float8_e4m3fn-matmul",
    "xla-k_major-per_tensor-per_channel-float8_e4m3fn-float8_e5m2-matmul",
    "pallas_gpu*",
)
def test_qtensors(backend, rng, lhs_scaling, rhs_scaling, lhs_dtype, rhs_dtype, fused, k_major):
    lhs, rhs, bias = operands(rng, (256, 256, 256, 4), jnp.bfloat16)
    lhs = quantized(lhs, lhs_dtype, scaling=lhs_scaling) if lhs_scaling else lhs
    rhs = quantized(rhs, rhs_dtype, scaling=rhs_scaling) if rhs_scaling else rhs
    sizes = random_sizes(rng, 4, 251)
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    out = function(backend=backend, transpose_rhs=k_major)(lhs, rhs.mT if k_major else rhs, sizes, bias=bias)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]


@pytest.mark.quick("xla", "pallas_gpu")
def test_transposed_qtensor(backend, rng):
    lhs, rhs, bias = operands(rng, (256, 128, 256, 4))
    lhs = quantized(lhs, scaling="1x128")
    rhs = quantized(rhs, scaling="128x128")
    sizes = random_sizes(rng, 4, 256)
    out = matmul(backend=backend, transpose_rhs=True)(lhs, rhs.mT, sizes, bias=bias)
    assert relative_error(out, dense_matmul(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]


@pytest.mark.quick("pallas_tpu", "pallas_gpu")
def test_groups_that_share_a_scale(backend, rng):
    lhs, rhs, _ = operands(rng, (64, 128, 128, 4))
    scale = jnp.asarray(rng.uniform(0.5, 2, (2, 1, 1)), jnp.float32)
    rhs = QTensor(quantized(rhs).values, scale)
    sizes = jnp.asarray([10, 20, 0, 34], jnp.int32)
    out = matmul(backend=backend)(lhs, rhs, sizes)
    assert relative_error(out, dense_matmul(lhs, rhs, sizes)) < limit_beside_8_bits(backend)


@pytest.mark.parametrize("k_major", [False, True], ids=["", "k_major"])
@pytest.mark.parametrize("lhs_scaling", ["1x128", "per_row"])
@pytest.mark.quick("*-1x128-k_major")
def test_scales_of_unowned_rows_are_never_data(backend, rng, lhs_scaling, k_major):
    lhs, rhs, _ = operands(rng, (256, 256, 256, 4))
    poisoned = quantized(lhs.at[200:].set(jnp.nan), scaling=lhs_scaling)
    rhs = quantized(rhs, scaling="128x128")
    sizes = random_sizes(rng, 4, 200)
    out = matmul(backend=backend, transpose_rhs=k_major)(poisoned, rhs.mT if k_major else rhs, sizes)
    clean = QTensor(poisoned.values.at[200:].set(0), poisoned.scale.at[200:].set(0))
    assert relative_error(out, dense_matmul(clean, rhs, sizes)) < LIMIT["bfloat16"]


@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(),
        Quantization("int8", "per_row", "per_channel"),
        Quantization("float8_e5m2", "per_tensor", "1x128"),
    ],
    ids=lambda q: f"{q.dtype}-{q.lhs_scaling}",
)
@pytest.mark.quick("pallas_tpu-float8_e4m3fn-1x128-gate_up", "xla-int8-per_row-matmul", "pallas_gpu*")
def test_quantization_inside_equals_explicit(backend, rng, quantization, fused):
    lhs, rhs, bias = operands(rng, (256, 256, 256, 4))
    sizes = random_sizes(rng, 4, 256)
    qlhs = quantized(lhs, quantization.dtype, scaling=quantization.lhs_scaling)
    qrhs = quantized(rhs, quantization.dtype, scaling=quantization.rhs_scaling)
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    out = function(backend=backend, quantization=quantization)(lhs, rhs, sizes, bias=bias)
    assert out.dtype == jnp.float32
    assert relative_error(out, oracle(qlhs, qrhs, sizes, bias)) < limit_in_8_bits(backend)


def test_quantization_inside_of_a_transposed_rhs(backend, rng):
    lhs, rhs, _ = operands(rng, (256, 256, 128, 4))
    sizes = random_sizes(rng, 4, 256)
    # 64 and 128 differ, so a scaling that forgot to transpose would not go unseen.
    inside = matmul(backend=backend, transpose_rhs=True, quantization=Quantization(rhs_scaling="64x128"))
    ref = dense_matmul(quantized(lhs, scaling="1x128"), quantized(rhs, scaling="64x128"), sizes)
    assert relative_error(inside(lhs, rhs.mT, sizes), ref) < limit_in_8_bits(backend)


@pytest.mark.parametrize("lhs_scaling", ["per_tensor", "per_channel", "64x128", "1x128"])
@pytest.mark.quick("xla-per_tensor")
def test_unowned_rows_do_not_enter_shared_scales(backend, rng, lhs_scaling):
    lhs, rhs, _ = operands(rng, (256, 256, 256, 2))
    sizes = jnp.asarray([40, 100, 70, 30], jnp.int32)
    mine = owned(256, sizes, 2, 1)[:, None]
    inside = matmul(backend=backend, quantization=Quantization(lhs_scaling=lhs_scaling))
    out = inside(jnp.where(mine, lhs, jnp.nan), rhs, sizes, group_offset=1)
    qlhs = quantized(jnp.where(mine, lhs, 0), scaling=lhs_scaling)
    ref = dense_matmul(qlhs, quantized(rhs, scaling="128x128"), sizes, group_offset=1)
    assert relative_error(out, ref) < limit_in_8_bits(backend)


def test_no_rows_quantised(backend):
    out = grouped_matmul(
        jnp.zeros((0, 128)),
        jnp.ones((2, 128, 128)),
        jnp.zeros(2, jnp.int32),
        quantization=Quantization(),
        backend=backend,
    )
    assert out.shape == (0, 128)


@pytest.mark.quick("xla", "pallas_gpu")
def test_dequantised_operands_give_the_same(backend, rng):
    lhs, rhs, _ = operands(rng, (256, 256, 256, 4))
    qlhs, qrhs = quantized(lhs, "int8", scaling="per_row"), quantized(rhs, "int8", scaling="per_channel")
    sizes = random_sizes(rng, 4, 256)
    out = matmul(backend=backend, preferred_element_type="float32")(qlhs, qrhs, sizes)
    plain = matmul(backend=backend)(dequantize(qlhs), dequantize(qrhs), sizes)
    assert relative_error(out, plain) < LIMIT["float32"]

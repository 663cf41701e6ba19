import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.quantize import Quantization
from tests.helpers import LIMIT, normal, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import (
    dense_gate_up,
    dense_matmul,
    gate_up,
    matmul,
    operands,
    owned,
    patterns_of_empty_groups,
    random_sizes,
)

backend = every_backend("grouped_matmul")

AWKWARD = (70, 33, 22, 8)  # M, K, N, G
ALIGNED = (256, 256, 256, 8)
BY_16_BYTES = (301, 200, 384, 8)  # no tile divides it, yet copy engines can address it
SMALLEST = (1, 1, 2, 1)
MANY_BLOCKS = (301, 130, 258, 3)
ONE_ROW = (1, 72, 40, 5)

EITHER = [(AWKWARD, "float32"), ((70, 200, 256, 8), "bfloat16")]
"""For every implementation one shape and dtype that it takes."""


@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product([AWKWARD, ALIGNED], ["float32", "bfloat16", "float16"]),
        *itertools.product([SMALLEST, MANY_BLOCKS, ONE_ROW], ["bfloat16"]),
        *itertools.product([BY_16_BYTES, (1, 64, 128, 512), (4096, 128, 256, 2)], ["bfloat16", "float16"]),
    ],
    ids=str,
)
@pytest.mark.quick(
    "pallas_tpu-(1, 64, 128, 512)-bfloat16-matmul", "xla-(301, 200, 384, 8)-bfloat16-gate_up", "pallas_gpu*"
)
def test_every_shape_and_dtype(backend, rng, shape, dtype, fused):
    lhs, rhs, bias = operands(rng, shape, dtype)
    sizes = random_sizes(rng, shape[3], shape[0])
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    out = function(backend=backend)(lhs, rhs, sizes, bias=bias)
    assert out.dtype == dtype
    assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT[dtype]


@pytest.mark.parametrize(("shape", "dtype"), EITHER, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize("share", ["some", "all"])
@pytest.mark.quick("pallas_*-some-matmul-*bfloat16")
def test_every_pattern_of_empty_groups(backend, rng, share, fused, shape, dtype):
    num_rows, _, _, num_groups = shape
    lhs, rhs, bias = operands(rng, shape, dtype)
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    for filled in patterns_of_empty_groups(rng, num_groups, share):
        shares = np.array(filled) / max(sum(filled), 1)
        used = int(rng.integers(num_rows // 2, num_rows + 1)) if any(filled) else 0
        sizes = rng.multinomial(used, shares) if used else np.zeros(num_groups, int)
        out = function(backend=backend)(lhs, rhs, jnp.asarray(sizes, jnp.int32), bias=bias)
        assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT[dtype], sizes


@pytest.mark.parametrize(("shape", "dtype"), EITHER, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.quick("xla-gate_up-*-float32", "pallas_gpu-*")
def test_all_rows_or_one_row_in_one_group(backend, rng, fused, shape, dtype):
    lhs, rhs, bias = operands(rng, shape, dtype)
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    for group, rows in itertools.product(range(shape[3]), (1, shape[0])):
        sizes = jnp.zeros(shape[3], jnp.int32).at[group].set(rows)
        out = function(backend=backend)(lhs, rhs, sizes, bias=bias)
        assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT[dtype]


@pytest.mark.quick("xla", "pallas_gpu")
def test_without_bias(backend, rng):
    lhs, rhs, _ = operands(rng, AWKWARD)
    sizes = random_sizes(rng, AWKWARD[3], AWKWARD[0])
    assert relative_error(matmul(backend=backend)(lhs, rhs, sizes), dense_matmul(lhs, rhs, sizes)) < LIMIT["float32"]


@pytest.mark.parametrize(("shape", "dtype"), EITHER, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize("used", [0, 1, 37, AWKWARD[0] - 1])
@pytest.mark.quick(
    "pallas_tpu-37-gate_up-(70, 200, 256, 8)-bfloat16",
    "pallas_tpu-69-matmul-(70, 200, 256, 8)-bfloat16",
    "xla-0-gate_up-(70, 33, 22, 8)-float32",
    "xla-1-gate_up-(70, 200, 256, 8)-bfloat16",
    "pallas_gpu*",
)
def test_rows_past_the_groups_are_never_data(backend, rng, used, fused, shape, dtype):
    lhs, rhs, bias = operands(rng, shape, dtype)
    sizes = random_sizes(rng, shape[3], used)
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    out = function(backend=backend)(lhs.at[used:].set(jnp.nan), rhs, sizes, bias=bias)
    assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT[dtype]
    assert not np.asarray(out[used:]).any()


@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize("static", [False, True], ids=["traced", "static"])
@pytest.mark.parametrize(("shape", "dtype"), EITHER, ids=str)
@pytest.mark.quick("*-(70, 200, 256, 8)-bfloat16-traced-matmul")
def test_window_of_groups(backend, rng, static, fused, shape, dtype):
    num_rows, k, n, num_groups = shape
    lhs, rhs, bias = operands(rng, (num_rows, k, n, 3), dtype)
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    for offset in (0, 2, num_groups - 3) if static else range(num_groups - 2):
        # Groups 2 to 4 are empty: the window at 2 owns no row at all.
        sizes = jnp.asarray([9, 0, 0, 0, 0, 21, 1, 30], jnp.int32)
        mine = owned(num_rows, sizes, 3, offset)
        others_nan = jnp.where(mine[:, None], lhs, jnp.nan)
        if static:
            out = function(backend=backend, group_offset=offset)(others_nan, rhs, sizes, bias=bias)
        else:
            out = function(backend=backend)(others_nan, rhs, sizes, bias=bias, group_offset=jnp.int32(offset))
        assert relative_error(out, oracle(lhs, rhs, sizes, bias, offset)) < LIMIT[dtype]
        assert not np.asarray(out)[~mine].any()


@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize(("shape", "dtype"), [(AWKWARD, "float32"), (AWKWARD, "bfloat16"), (BY_16_BYTES, "bfloat16")])
@pytest.mark.quick("*-shape2-bfloat16-gate_up")
def test_transposed_rhs(backend, rng, shape, dtype, fused):
    lhs, rhs, bias = operands(rng, shape, dtype)
    sizes = random_sizes(rng, shape[3], shape[0])
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    out = function(backend=backend, transpose_rhs=True)(lhs, rhs.mT, sizes, bias=bias)
    assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT[dtype]


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"])
@pytest.mark.quick(
    "pallas_tpu-swigluoai-0.5", "xla-gelu-None", "xla-gelu_tanh-0.5", "xla-relu2-None", "xla-silu-None", "pallas_gpu*"
)
def test_fused_activation(backend, rng, activation, limit):
    lhs, rhs, bias = operands(rng, AWKWARD)
    sizes = random_sizes(rng, AWKWARD[3], AWKWARD[0] - 6)
    fused = gate_up(backend=backend, activation=activation, activation_limit=limit)
    out = fused(lhs, rhs, sizes, bias=bias)
    ref = dense_gate_up(lhs, rhs, sizes, bias, activation=activation, limit=limit)
    assert relative_error(out, ref) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("lhs_dtype", "rhs_dtype", "preferred"),
    [("bfloat16", "float32", None), ("bfloat16", "bfloat16", "float32"), ("float32", "bfloat16", "bfloat16")],
)
@pytest.mark.quick("xla-bfloat16-bfloat16-float32", "pallas_gpu-bfloat16-bfloat16-float32")
def test_result_dtype(backend, rng, lhs_dtype, rhs_dtype, preferred):
    lhs, rhs, _ = operands(rng, AWKWARD)
    lhs, rhs = lhs.astype(lhs_dtype), rhs.astype(rhs_dtype)
    sizes = random_sizes(rng, AWKWARD[3], AWKWARD[0])
    out = matmul(backend=backend, preferred_element_type=preferred)(lhs, rhs, sizes)
    assert out.dtype == (preferred or lhs_dtype)
    assert relative_error(out, dense_matmul(lhs, rhs, sizes)) < LIMIT[out.dtype.name]


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
@pytest.mark.quick("xla-*", "pallas_gpu*")
def test_narrow_group_sizes_do_not_overflow(backend, rng, dtype):
    lhs, rhs, _ = operands(rng, (301, 16, 8, 4))
    sizes = jnp.asarray([90, 100, 60, 51], dtype)
    assert relative_error(grouped_matmul(lhs, rhs, sizes, backend=backend), dense_matmul(lhs, rhs, sizes)) < 1e-5


@pytest.mark.parametrize("shape", [(0, 8, 6, 3), (5, 0, 6, 3), (5, 8, 0, 3)], ids=str)
@pytest.mark.quick("pallas_tpu-(5, 8, 0, 3)", "xla-(0, 8, 6, 3)", "xla-(5, 0, 6, 3)", "pallas_gpu*")
def test_empty_operands(backend, rng, shape):
    m, k, n, g = shape
    lhs, rhs, bias = jnp.ones((m, k)), jnp.ones((g, k, n)), normal(rng, g, n)
    sizes = jnp.asarray([m, 0, 0], jnp.int32)
    for function, oracle in ((grouped_matmul, dense_matmul), (grouped_gate_up, dense_gate_up)):
        out = function(lhs, rhs, sizes, bias=bias, backend=backend)
        assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT["float32"]


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["float", "fp8"])
@pytest.mark.quick("xla-float", "pallas_gpu-float")
def test_same_inputs_same_bits(backend, rng, quantization):
    lhs, rhs, bias = operands(rng, ALIGNED, jnp.bfloat16)
    sizes = random_sizes(rng, ALIGNED[3], ALIGNED[0])
    function = gate_up(backend=backend, quantization=quantization)
    first = function(lhs, rhs, sizes, bias=bias)
    assert all(same_bits(first, function(lhs, rhs, sizes, bias=bias)) for _ in range(3))


def test_rows_do_not_depend_on_their_neighbours(backend, rng):
    lhs, rhs, _ = operands(rng, AWKWARD)
    sizes = random_sizes(rng, AWKWARD[3], AWKWARD[0] - 5)
    out = matmul(backend=backend)(lhs, rhs, sizes)
    row = int(rng.integers(AWKWARD[0] - 5))
    changed = matmul(backend=backend)(lhs.at[row].set(jnp.inf), rhs, sizes)
    assert same_bits(np.delete(out, row, 0), np.delete(changed, row, 0))
    assert not np.isfinite(changed[row]).any()

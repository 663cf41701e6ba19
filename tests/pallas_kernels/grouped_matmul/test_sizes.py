"""Group sizes that are negative, or of more rows than there are: one answer, whichever backend gives it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec

from pallas_kernels.debug import debug_checks
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.grouped_matmul.group_sizes import as_group_sizes, bounds
from pallas_kernels.quantize import Quantization, dequantize
from sharding.mesh import EXPERT_AXIS, make_mesh
from tests.helpers import LIMIT, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import dense_gate_up, dense_matmul, gate_up, jitted, matmul, operands
from tests.pallas_kernels.grouped_matmul.test_gradients import (
    assert_all_close,
    dense_gradients,
    problem,
    value_and_gradients,
)

backend = every_backend("grouped_matmul")

M, K, N, G = 70, 64, 128, 6
MOST, LEAST = np.iinfo(np.int32).max, np.iinfo(np.int32).min
SIZES = {
    "fitting": ([10, 20, 0, 5, 15, 0], [10, 20, 0, 5, 15, 0]),
    "full": ([10, 20, 0, 5, 35, 0], [10, 20, 0, 5, 35, 0]),
    "negative": ([10, -20, 0, -1, 15, LEAST], [10, 0, 0, 0, 15, 0]),
    "all negative": ([LEAST] * 6, [0] * 6),
    "past the end": ([10, 20, 0, 41, 15, 3], [10, 20, 0, 40, 0, 0]),
    "one huge": ([10, MOST, 0, 5, 15, 0], [10, 60, 0, 0, 0, 0]),
    "all huge": ([MOST] * 6, [70, 0, 0, 0, 0, 0]),
    "huge after negative": ([-5, MOST, LEAST, MOST - 3, 15, -1], [0, 70, 0, 0, 0, 0]),
}

sizes_and_rows = pytest.mark.parametrize(("sizes", "rows"), SIZES.values(), ids=list(SIZES))


@sizes_and_rows
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.quick(
    "pallas_tpu-matmul-negative",
    "xla-gate_up-all huge",
    "xla-gate_up-all negative",
    "xla-gate_up-fitting",
    "xla-gate_up-full",
    "xla-gate_up-huge after negative",
    "xla-gate_up-one huge",
    "xla-matmul-past the end",
    "pallas_gpu*",
)
def test_products(backend, rng, fused, sizes, rows):
    lhs, rhs, bias = operands(rng, (M, K, N, G), "bfloat16")
    function, oracle = (gate_up, dense_gate_up) if fused else (matmul, dense_matmul)
    lhs = lhs.at[sum(rows) :].set(jnp.nan)
    out = function(backend=backend)(lhs, rhs, jnp.array(sizes, jnp.int32), bias=bias)
    assert relative_error(out, oracle(lhs.at[sum(rows) :].set(0), rhs, rows, bias)) < LIMIT["bfloat16"]


@sizes_and_rows
@pytest.mark.quick("xla-fitting", "xla-negative")
def test_gradients(backend, rng, sizes, rows):
    lhs, rhs, bias, dout = problem(rng, M, K, N, G, dtype="bfloat16")
    _, gradients = value_and_gradients(grouped_matmul, backend=backend)(lhs, rhs, bias, jnp.array(sizes), dout)
    assert_all_close(gradients, dense_gradients(lhs, rhs, rows, dout), LIMIT["bfloat16"])


@sizes_and_rows
@pytest.mark.quick("xla-*")
def test_a_window(backend, rng, sizes, rows):
    lhs, rhs, bias = operands(rng, (M, K, N, 3), "bfloat16")
    out = matmul(backend=backend)(lhs, rhs, jnp.array(sizes, jnp.int32), bias=bias, group_offset=jnp.int32(2))
    assert relative_error(out, dense_matmul(lhs, rhs, rows, bias, group_offset=2)) < LIMIT["bfloat16"]


@sizes_and_rows
@pytest.mark.quick("fitting")
def test_rounded_inside(rng, sizes, rows):
    lhs, rhs, _ = operands(rng, (M, K, N, G))
    options = dict(quantization=Quantization(lhs_scaling="per_tensor", rhs_scaling="per_channel"), backend="xla")
    run = matmul(**options)
    assert same_bits(run(lhs, rhs, jnp.array(sizes, jnp.int32)), run(lhs, rhs, jnp.array(rows, jnp.int32)))


@sizes_and_rows
@pytest.mark.quick(
    "pallas_tpu-one huge",
    "pallas_tpu-past the end",
    "xla-all huge",
    "xla-all negative",
    "xla-fitting",
    "xla-full",
    "xla-huge after negative",
    "xla-negative",
    "pallas_gpu*",
)
def test_a_result_in_8_bits(backend, rng, sizes, rows):
    lhs, rhs, _ = operands(rng, (M, K, 2 * N, G), "bfloat16")
    run = jitted(grouped_gate_up_in_8_bits, backend=backend)
    out = dequantize(run(lhs, rhs, jnp.array(sizes, jnp.int32)))
    assert relative_error(out, dense_gate_up(lhs, rhs, rows)) < 0.05
    assert not np.asarray(out)[sum(rows) :].any()


@functools.partial(jax.jit, static_argnums=1)
def rows_of(sizes, num_rows):
    """Where groups begin and end."""
    return bounds(as_group_sizes(sizes, num_rows), num_rows)


def check_rows(sizes, num_rows, ends):
    begin, end = rows_of(sizes, num_rows)
    assert begin.dtype == end.dtype == jnp.int32
    assert end.tolist() == list(ends)
    assert begin.tolist() == [0, *ends[:-1]]


@sizes_and_rows
def test_the_rows_themselves(sizes, rows):
    check_rows(jnp.array(sizes, jnp.int32), M, np.cumsum(rows))


@pytest.mark.parametrize("num_rows", [0, 1, (1 << 30) + 1, MOST])
@pytest.mark.parametrize("num_groups", [1, 2, 7, 300])
@pytest.mark.quick("1-1", "2-0", "300-1073741825", "7-2147483647")
def test_sums_do_not_wrap_round(rng, num_rows, num_groups):
    sizes = rng.choice([0, 1, -1, 1 << 29, (1 << 31) - 2, MOST, LEAST], num_groups)
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0), dtype=np.int64), num_rows)
    check_rows(jnp.asarray(sizes, jnp.int32), num_rows, ends)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("num_rows", [70, 100_000])
@pytest.mark.quick(
    "100000-int64", "100000-int8", "100000-uint16", "100000-uint32", "100000-uint64", "100000-uint8", "70-int16"
)
def test_other_integers(dtype, num_rows):
    info = np.iinfo(dtype)
    sizes = [1, int(info.min), 3, max(int(info.min), 5 - (1 << 32)), int(info.max), 2]
    ends = np.minimum(np.cumsum(np.array([max(size, 0) for size in sizes], object)), num_rows)
    with jax.enable_x64(True):
        check_rows(jnp.array(sizes, dtype), num_rows, ends)


def test_a_sum_that_wraps_round_in_its_dtype_is_too_large():
    with jax.enable_x64(True), raises_saying(ValueError, "group_sizes", "M = 6", str(1 << 64)):
        grouped_matmul(jnp.ones((6, 4)), jnp.ones((2, 4, 8)), jnp.array([1 << 63, 1 << 63], "uint64"))


def checked(sizes, function=grouped_matmul, **options):
    """What goes wrong with these sizes while checks are on."""
    lhs, rhs = jnp.ones((M, K)), jnp.ones((G, K, N))
    run = checkify.checkify(lambda sizes: function(lhs, rhs, sizes, backend="xla", **options))
    with debug_checks():
        return jax.jit(run)(jnp.array(sizes, jnp.int32))[0]


@pytest.mark.parametrize("function", [grouped_matmul, grouped_gate_up])
@pytest.mark.parametrize(
    ("name", "group", "size"),
    [("negative", 1, -20), ("past the end", 3, 41), ("one huge", 1, MOST), ("all huge", 0, MOST)],
)
@pytest.mark.quick(
    "all huge-0-2147483647-grouped_matmul",
    "negative-1--20-grouped_matmul",
    "one huge-1-2147483647-grouped_gate_up",
    "past the end-3-41-grouped_matmul",
)
def test_debug_checks_name_the_group(function, name, group, size):
    message = checked(SIZES[name][0], function).get()
    assert f"group_sizes[{group}] = {size}: sizes must be at least 0 and sum to at most M = {M}" in message


@pytest.mark.parametrize("name", ["fitting", "full"])
def test_debug_checks_pass(name):
    assert checked(SIZES[name][0]).get() is None


def test_debug_checks_of_gradients():
    def loss(lhs, sizes):
        return grouped_matmul(lhs, jnp.ones((G, K, N)), sizes, backend="xla").sum()

    with debug_checks():
        error, _ = jax.jit(checkify.checkify(jax.grad(loss)))(jnp.ones((M, K)), jnp.array(SIZES["negative"][0]))
    with raises_saying(checkify.JaxRuntimeError, "group_sizes[1] = -20"):
        error.throw()


def test_debug_checks_can_be_turned_off_again():
    with debug_checks(), debug_checks(False):
        out = jax.jit(lambda sizes: as_group_sizes(sizes, M))(jnp.array(SIZES["negative"][0]))
    assert out.tolist() == SIZES["negative"][0]


def test_debug_checks_need_checkify():
    with debug_checks(), raises_saying(ValueError, "checkify"):
        jax.jit(lambda sizes: as_group_sizes(sizes, M))(jnp.zeros(G, int))


def test_across_a_mesh(rng):
    """Sizes that differ from chip to chip, of rows that do."""
    split = PartitionSpec(EXPERT_AXIS)
    sizes = jnp.array([[4, -1], [MOST, MOST]], jnp.int32)
    lhs, rhs = normal(rng, 12, 8), normal(rng, 2, 8, 16)

    def run(lhs, sizes):
        return grouped_matmul(lhs, rhs, sizes[0], backend="xla")

    out = jax.jit(jax.shard_map(run, mesh=make_mesh(2), in_specs=split, out_specs=split))(lhs, sizes)
    parts = [dense_matmul(lhs[:6], rhs, [4, 0]), dense_matmul(lhs[6:], rhs, [6, 0])]
    assert relative_error(out, np.concatenate(parts)) < LIMIT["float32"]

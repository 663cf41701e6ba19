"""What every backend must give: the bits of `quantize`, of the rows that each group owns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.columns import BLOCK, dequantize_columns, first_blocks, padded_rows
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize_columns import quantize_columns
from tests.helpers import float64, normal, raises_saying
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.quantize_columns.rows import SIZES, UNOWNED, assert_equal, expected, first, random, random_ids

backend = every_backend("quantize_columns")


def run(backend, x, sizes, row_ids=None, dtype="float8_e4m3fn"):
    function = functools.partial(quantize_columns, dtype=dtype, backend=backend)
    return jax.jit(lambda x, sizes, ids: function(x, sizes, row_ids=ids))(x, jnp.asarray(sizes), row_ids)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("features", [128, 256, 384])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.quick("xla-ragged-256-bfloat16-*", "xla-one*-128-float32-*m3fn", "xla-no*-384-float16-*m2")
def test_values(backend, rng, sizes, features, of, dtype):
    sizes = SIZES[sizes]
    x = random(rng, (sum(sizes) + UNOWNED, features), of)
    assert_equal(run(backend, x, sizes, dtype=dtype), expected(x, sizes, dtype=dtype))


@pytest.mark.parametrize("of", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.quick("xla-ragged-bfloat16", "xla-no rows-float32")
def test_rows_of_tokens(backend, rng, sizes, of):
    sizes = SIZES[sizes]
    x, ids = random(rng, (40, 256), of), random_ids(rng, sum(sizes) + UNOWNED, 40)
    assert_equal(run(backend, x, sizes, ids), expected(x, sizes, ids))


def test_rows_of_a_plan(backend, rng):
    """What dispatching and then rounding gives."""
    x = random(rng, (100, 128), "bfloat16")
    plan = make_plan(jnp.asarray(rng.integers(-1, 5, size=(100, 3)), jnp.int32), 5)
    of_tokens = run(backend, x, plan.group_sizes, plan.order // 3)
    blocks = int(first_blocks(plan.group_sizes)[-1])
    of_rows = first(run(backend, dispatch(x, plan), plan.group_sizes), blocks)
    assert_equal(of_tokens, of_rows)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_a_fault_stays_in_its_block_and_feature(backend, rng, fault):
    sizes = (200, 100)
    x = np.asarray(random(rng, (310, 256), "float32")).copy()
    x[300:] = fault  # of no group
    x[150, 7] = x[250, 8] = fault
    got = run(backend, jnp.asarray(x), sizes)
    wanted = np.ones((3, 256), bool)
    wanted[1, 7] = wanted[2, 8] = False
    np.testing.assert_array_equal(np.isfinite(got.scale[:3]), wanted)
    assert_equal(got, expected(x, sizes))


def test_zeros(backend, rng):
    x = np.asarray(random(rng, (256, 128), "bfloat16")).copy()
    x[:128, 3] = 0
    x[128:, 4] = -0.0
    got = run(backend, jnp.asarray(x), (256,))
    assert got.scale[0, 3] == got.scale[1, 4] == 1
    assert_equal(got, expected(x, (256,)))


def test_no_tokens(backend):
    got = run(backend, jnp.ones((0, 128), jnp.bfloat16), (3, 2), jnp.full(5, -1, jnp.int32))
    assert (float64(got.values[:, : 2 * BLOCK]) == 0).all()
    assert (got.scale[:2] == 1).all()


def test_what_the_columns_stand_for(backend, rng):
    """The product of two of them is the gradient of a group's weights."""
    sizes, x, dout = (200, 70), normal(rng, 270, 128), normal(rng, 270, 256)
    rows, cotangents = (dequantize_columns(run(backend, each, sizes)) for each in (x, dout))
    of_second = slice(2 * BLOCK, 3 * BLOCK)
    wanted = float64(x)[200:].T @ float64(dout)[200:]
    error = float64(rows)[of_second].T @ float64(cotangents)[of_second] - wanted
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(wanted)  # e4m3 has four bits


@pytest.mark.slow
def test_as_large_as_a_layer(backend, rng):
    sizes = rng.multinomial(8 * 1024, np.ones(16) / 16)
    x, ids = random(rng, (1024, 2048), "bfloat16"), random_ids(rng, 8 * 1024, 1024)
    assert_equal(run(backend, x, sizes, ids), expected(x, sizes, ids))


def test_under_transformations(backend, rng):
    sizes = jnp.asarray([30, 100])
    x = random(rng, (3 * 130, 128), "float32").reshape(3, 130, 128)
    columns = functools.partial(quantize_columns, group_sizes=sizes, backend=backend)
    mapped = jax.jit(jax.vmap(columns))(x)
    checkpointed = jax.jit(lambda x: jax.lax.map(jax.checkpoint(columns), x))(x)
    for i, rows in enumerate(x):
        for got in (mapped, checkpointed):
            assert_equal(jax.tree.map(lambda leaf, i=i: leaf[i], got), expected(rows, (30, 100)))


def test_where_blocks_are():
    assert first_blocks(jnp.asarray([130, 0, 5])).tolist() == [0, 2, 2, 3]
    assert padded_rows(140, 3) == 4 * BLOCK


def test_no_gradient_passes():
    with raises_saying(TypeError, "quantize_columns", "stop_gradient"):
        jax.grad(lambda x: quantize_columns(x, jnp.asarray([8])).scale.sum())(jnp.ones((8, 128)))


@pytest.mark.parametrize(
    ("operands", "options", "parts"),
    [
        ((jnp.ones((2, 8, 128)), jnp.ones(2, int)), {}, ["x", "[M, F]", "[2, 8, 128]"]),
        ((jnp.ones((8, 128), jnp.int8), jnp.ones(2, int)), {}, ["x", "floating point", "int8"]),
        ((jnp.ones((8, 128)), jnp.ones(2)), {}, ["group_sizes", "integer", "float32[2]"]),
        ((jnp.ones((8, 128)), jnp.ones(2, int)), {"row_ids": jnp.ones(8)}, ["row_ids", "int32", "float32[8]"]),
        ((jnp.ones((8, 128)), jnp.ones(2, int)), {"dtype": "int4"}, ["dtype", "int8", "int4"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(operands, options, parts):
    with raises_saying(ValueError, *parts):
        quantize_columns(*operands, **options)

"""The kernel for one to eight rows: interpreted on a machine without a Hopper; and where it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chips import get_chip
from pallas_kernels.float32_matmul import float32_matmul, gpu
from pallas_kernels.float32_matmul.gpu import few_rows
from pallas_kernels.float32_matmul.gpu.few_rows import Config
from pallas_kernels.tracing.target import targeting
from tests.helpers import float64, normal, relative_error
from tests.pallas_kernels.kernels_gpu import interpreted

PRECISE = 1e-6


def multiplied(x: jax.Array, y: jax.Array, config: Config) -> jax.Array:
    with interpreted():
        return jax.jit(functools.partial(few_rows.float32_matmul, config=config))(x, y)


@pytest.mark.parametrize(
    ("sizes", "config", "lhs", "rhs"),
    [
        ((1, 128, 8), Config(4), "float32", "float32"),  # one piece
        ((3, 700, 24), Config(4), "bfloat16", "float32"),  # a turn, and a piece and a half
        ((8, 130, 8), Config(4), "float16", "bfloat16"),
        ((2, 1536, 8), Config(4, pieces=2), "float32", "bfloat16"),  # whole turns, in a loop and after it
        ((1, 2500, 8), Config(4, pieces=2), "bfloat16", "bfloat16"),
        ((3, 64, 8), Config(8), "float32", "float16"),
        ((1, 777, 24), Config(8, pieces=1), "bfloat16", "float16"),
        ((8, 2048, 16), Config(8, pieces=4), "bfloat16", "float32"),
        ((4, 300, 8), Config(8), "float16", "float16"),
        ((5, 256, 8), Config(8), "float16", "float32"),
    ],
    ids=str,
)
@pytest.mark.quick("(1, 128*", "(3, 700*", "(8, 130*", "(2, 1536*", "(3, 64*", "(1, 777*")
def test_interpreted(sizes, config, lhs, rhs, rng):
    num_rows, depth, num_columns = sizes
    x, y = normal(rng, num_rows, depth, dtype=lhs), normal(rng, depth, num_columns, dtype=rhs)
    product = multiplied(x, y, config)
    assert product.dtype == jnp.float32
    assert relative_error(product, float64(x) @ float64(y)) < PRECISE


@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.quick("4")
def test_what_is_not_finite_stays_in_its_row_and_column(columns, rng):
    """Also what lies in rows that several pieces read and one of them counts."""
    x, y = normal(rng, 4, 700), normal(rng, 700, 16)
    expected = float64(x) @ float64(y)
    x = x.at[1, 600].set(jnp.nan).at[2, 690].set(jnp.inf)
    y = y.at[690, 5].set(jnp.inf).at[650, 9].set(-jnp.inf).at[10, 12].set(jnp.nan)
    product = np.asarray(multiplied(x, y, Config(columns)))
    assert np.isnan(product[1]).all()
    assert np.isnan(product[:, 12]).all()
    rows, fine = [0, 3], [i for i in range(16) if i not in (5, 9, 12)]
    assert relative_error(product[np.ix_(rows, fine)], expected[np.ix_(rows, fine)]) < PRECISE
    np.testing.assert_array_equal(product[2, fine], np.sign(y[690, np.array(fine)]) * np.inf)
    np.testing.assert_array_equal(product[rows, 5], np.sign(x[np.array(rows), 690]) * np.inf)
    np.testing.assert_array_equal(product[rows, 9], -np.sign(x[np.array(rows), 650]) * np.inf)


def test_derivatives_and_batches(rng):
    """As of the product in plain XLA, also of several products."""
    x, kernel = normal(rng, 2, 2, 128), normal(rng, 128, 8)

    def loss(backend: str):
        product = jax.vmap(functools.partial(float32_matmul, backend=backend), (0, None))

        def of(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            terms = jnp.sin(product(x, kernel))
            return terms.sum(), terms

        return jax.jit(jax.grad(of, argnums=(0, 1), has_aux=True))

    assert "warpgroup" in traced(loss("pallas_gpu"), x, kernel)
    with interpreted():
        gradients, terms = loss("pallas_gpu")(x, kernel)
    expected_gradients, expected = loss("xla")(x, kernel)
    assert relative_error(terms, expected) < 1e-4
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(found, gradient) < 1e-4


def traced(function, *args) -> str:
    """The program, with the kernels in it."""
    return str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize(
    ("sizes", "columns"),
    [
        ((1, 2880, 128), 4),
        ((8, 7168, 528), 4),
        ((8, 7168, 536), 8),
        ((1, 128, 8), 4),
        ((9, 2880, 128), None),
        ((0, 2880, 128), None),
        ((1, 2880, 12), None),
        ((1, 2880, 0), None),
        ((1, 127, 8), None),
        ((1, 2880, 1064), None),
    ],
    ids=str,
)
def test_the_sizes_that_it_takes(sizes, columns):
    num_rows, depth, num_columns = sizes
    x = jax.ShapeDtypeStruct((num_rows, depth), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((depth, num_columns), jnp.float32)
    config = few_rows.pick(x, y, jnp.dtype("float32"), get_chip("h200"))
    assert (None if config is None else config.columns) == columns


@pytest.mark.parametrize(
    ("chip", "out", "dtype", "is_taken"),
    [
        ("h200", "float32", "float32", True),
        ("h100", "float32", "bfloat16", True),
        ("b200", "float32", "float32", False),
        ("h200", "bfloat16", "float32", False),
        ("h200", "float32", "float8_e4m3fn", False),
    ],
)
def test_where_it_is_taken(chip, out, dtype, is_taken):
    """Elsewhere the product is in parts, without a warning."""
    x, y = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 64), dtype)
    with targeting(get_chip(chip)):
        program = traced(functools.partial(gpu.float32_matmul, out_dtype=jnp.dtype(out)), x, y)
    assert ("warpgroup" in program) == is_taken
    assert ("dot_general" in program) != is_taken


def test_more_rows_of_16_bits_are_the_matrix_units(rng):
    x, wide, narrow = (
        jax.ShapeDtypeStruct(*each)
        for each in (((5, 512), "bfloat16"), ((512, 64), "float32"), ((512, 64), "bfloat16"))
    )
    taken = [few_rows.pick(x, y, jnp.dtype("float32"), get_chip("h200")) is not None for y in (wide, narrow)]
    assert taken == [True, False]


def test_not_of_a_number_of_rows_that_is_a_symbol():
    (tokens,) = jax.export.symbolic_shape("t")
    x, y = jax.ShapeDtypeStruct((tokens, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 64), jnp.float32)
    assert few_rows.pick(x, y, jnp.dtype("float32"), get_chip("h200")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("depth", [2880, 7168])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_on_a_gpu(num_rows, depth, dtype, rng):
    """As in float64; and the same bits, run after run."""
    x, y = normal(rng, num_rows, depth, dtype="bfloat16"), normal(rng, depth, 128, dtype=dtype)
    product = jax.jit(functools.partial(float32_matmul, backend="pallas_gpu"))
    found = [np.asarray(product(x, y)) for _ in range(3)]
    assert relative_error(found[0], float64(x) @ float64(y)) < PRECISE
    assert relative_error(found[0], float32_matmul(x, y, backend="xla")) < PRECISE
    assert all(np.array_equal(found[0], again) for again in found)

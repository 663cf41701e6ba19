import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize import (
    QTensor,
    Quantization,
    block_shape,
    check_qdtype,
    check_qtensor,
    dequantize,
    quantize,
    scale_shape,
)
from tests.helpers import float64, normal, raises_saying, same_bits

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
DTYPES = list(LARGEST)
SCALINGS = ["per_tensor", "per_row", "per_channel", "1x128", "128x128", "32x64"]

jitted = jax.jit(quantize, static_argnums=1, static_argnames=("dtype", "scaling"))


def block_of(shape, scaling) -> tuple[int, int]:
    """Rows and columns of a block, written out."""
    rows, columns = shape[-2:]
    named = {"per_tensor": (rows, columns), "per_row": (1, columns), "per_channel": (rows, 1)}
    return named[scaling] if scaling in named else tuple(map(int, scaling.split("x")))


def spread(scale: np.ndarray, shape) -> np.ndarray:
    """`scale` repeated to `shape`."""
    for axis in (-1, -2):
        scale = np.repeat(scale, shape[axis] // scale.shape[axis], axis)
    return scale


def step(x: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """The largest error that rounding to nearest may make: half a step at the magnitude of x."""
    if dtype == "int8":
        return scale / 2
    mantissa, smallest = {"float8_e4m3fn": (3, 2.0**-9), "float8_e5m2": (2, 2.0**-16)}[dtype]
    return np.maximum(np.abs(x) * 2.0 ** -(mantissa + 1), scale * smallest / 2)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.quick(
    "float8_e4m3fn-per_tensor",
    "float8_e5m2-128x128",
    "float8_e5m2-32x64",
    "float8_e5m2-per_channel",
    "float8_e5m2-per_row",
    "int8-1x128",
)
def test_error_is_at_most_half_a_step(rng, dtype, scaling):
    x = normal(rng, 256, 128) * jnp.asarray(10.0 ** rng.uniform(-3, 3, (256, 1)), jnp.float32)
    q = jitted(x, dtype, scaling=scaling)
    assert q.dtype == dtype
    assert q.scale.dtype == jnp.float32
    scale = spread(float64(q.scale), x.shape)
    error = np.abs(float64(q.values) * scale - float64(x))
    # x / scale is rounded to float32 first, which can tip it over the middle between two integers.
    assert (error <= step(float64(x), scale, dtype) * (1 + 1e-4)).all()
    rows, columns = block_of(x.shape, scaling)
    blocks = np.abs(float64(x)).reshape(256 // rows, rows, 128 // columns, columns)
    np.testing.assert_allclose(q.scale, blocks.max((1, 3)) / LARGEST[dtype], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitudes_become_exactly_the_largest_value(rng, dtype):
    x = rng.uniform(-1, 1, (1000, 128)).astype(np.float32)
    x[:, 5] = rng.uniform(1, 1000, 1000)
    x[:, 9] = -x[:, 5]
    values = float64(jitted(jnp.asarray(x), dtype, scaling="per_row").values)
    assert (values[:, 5] == LARGEST[dtype]).all()
    assert (values[:, 9] == -LARGEST[dtype]).all()
    assert np.abs(values).max() == LARGEST[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
def test_nothing_finite_overflows(dtype, source):
    largest = float(jnp.finfo(source).max)
    x = jnp.array([[largest, -largest, largest / 3, 1.0] * 32], source)
    q = jitted(x, dtype, scaling="per_row")
    assert np.isfinite(float64(q.values)).all()
    assert np.isfinite(float64(q.scale)).all()
    np.testing.assert_array_equal(float64(q.values)[0, :2], [LARGEST[dtype], -LARGEST[dtype]])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_rounds_to_nearest_ties_to_even(dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    positive = np.unique(every[np.isfinite(every) & (every >= 0)])
    assert positive[-1] == LARGEST[dtype]
    ties = (positive[1:] + positive[:-1]) / 2
    halves = np.stack([ties * (1 - 2.0**-20), ties, ties * (1 + 2.0**-20)])
    even = np.where(np.arange(len(ties)) % 2 == 0, positive[:-1], positive[1:])
    expected = np.stack([positive[:-1], even, positive[1:]])
    # A row that holds the largest value has scale 1, so that nothing but the rounding is seen.
    top = np.full((3, 1), positive[-1])
    x = np.concatenate([top, halves, -halves, positive[None].repeat(3, 0)], 1)
    expected = np.concatenate([top, expected, -expected, positive[None].repeat(3, 0)], 1)
    q = jitted(jnp.asarray(x, jnp.float32), dtype, scaling="per_row")
    np.testing.assert_array_equal(q.scale, 1)
    np.testing.assert_array_equal(float64(q.values), expected)


def test_int8_rounds_to_nearest_ties_to_even():
    x = jnp.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 125.5, -126.5, 0.49999997, 3.4999998]])
    assert jitted(x, "int8").values.tolist() == [[127, 0, 2, 2, 0, -2, 126, 126, -126, 0, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_scale_one(dtype):
    x = jnp.zeros((4, 256)).at[1, 200].set(3.0).at[2, 0].set(-0.0)
    q = jitted(x, dtype, scaling="1x128")
    np.testing.assert_allclose(q.scale, jnp.ones((4, 2)).at[1, 1].set(3 / LARGEST[dtype]), rtol=1e-6)
    np.testing.assert_array_equal(dequantize(q) == 0, x == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [1e-20, 1e-30, 1e-32, 1e-34, 1e-36, 1.2e-38, 1e-40, 1e-45])
@pytest.mark.quick(
    "1.2e-38-float8_e5m2",
    "1e-20-int8",
    "1e-30-int8",
    "1e-32-float8_e4m3fn",
    "1e-34-int8",
    "1e-36-float8_e4m3fn",
    "1e-40-float8_e5m2",
    "1e-45-float8_e4m3fn",
)
def test_tiny_magnitudes_give_small_finite_numbers(dtype, amax):
    x = np.array([[amax, -amax / 2, 0]])
    q = jitted(jnp.asarray(x, jnp.float32), dtype)
    assert np.isfinite(float64(q.scale)).all()
    assert (float64(q.scale) > 0).all()
    error = np.abs(float64(q.values) * float64(q.scale) - x)
    if amax >= 1e-32:  # above it, the scale is a normal float32 whose reciprocal is finite
        assert (error <= amax * 2.0**-4).all()
    assert (error <= amax * 1.001).all()


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.quick(
    "float8_e4m3fn-per_row--inf",
    "float8_e5m2-1x128-inf",
    "int8-128x128-nan",
    "int8-32x64--inf",
    "int8-per_channel-inf",
    "int8-per_tensor-inf",
)
def test_a_fault_poisons_its_block_and_nothing_else(rng, dtype, scaling, fault):
    x = normal(rng, 256, 128)
    row, column = rng.integers(256), rng.integers(128)
    poisoned = np.isnan(dequantize(jitted(x.at[row, column].set(fault), dtype, scaling=scaling)))
    rows, columns = block_of(x.shape, scaling)
    expected = np.zeros(x.shape, bool)
    row, column = row // rows * rows, column // columns * columns
    expected[row : row + rows, column : column + columns] = True
    np.testing.assert_array_equal(poisoned, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["bfloat16", "float16"])
@pytest.mark.quick("bfloat16-float8_e4m3fn", "bfloat16-int8", "float16-float8_e5m2")
def test_narrow_inputs_are_quantised_as_their_float32_values(rng, dtype, source):
    x = normal(rng, 32, 128, dtype=source)
    assert same_bits(jitted(x, dtype, scaling="per_row"), jitted(x.astype(jnp.float32), dtype, scaling="per_row"))


def test_leading_dimensions_have_scales_of_their_own(rng):
    x = normal(rng, 3, 256, 128) * jnp.array([1.0, 100.0, 0.01])[:, None, None]
    q = jitted(x, scaling="128x128")
    assert q.scale.shape == (3, 2, 1)
    for i in range(3):
        one = jitted(x[i], scaling="128x128")
        assert same_bits((q.values[i], q.scale[i]), (one.values, one.scale))


def test_same_inputs_same_bits(rng):
    x = normal(rng, 256, 128)
    first = jitted(x, scaling="1x128")
    assert same_bits(first, jitted(x, scaling="1x128"))
    assert same_bits(first, quantize(x, scaling="1x128"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize_multiplies_each_block_by_its_scale(rng, dtype):
    q = QTensor(
        jnp.asarray(rng.integers(-127, 128, (2, 6, 8)), jnp.int8), jnp.asarray(rng.random((1, 3, 2)), jnp.float32)
    )
    scale = np.repeat(np.repeat(np.repeat(np.asarray(q.scale), 2, 0), 2, 1), 4, 2)
    expected = (np.asarray(q.values).astype(np.float32) * scale).astype(jnp.dtype(dtype))
    out = dequantize(q, dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 64, 128), (256, 0)], ids=str)
@pytest.mark.quick("(0, 128)-per_channel", "(0, 64, 128)-per_row", "(256, 0)-per_channel")
def test_empty_arrays(shape, scaling):
    if shape[-2] % block_of((1, 1), scaling)[0] or shape[-1] % block_of((1, 1), scaling)[1]:
        shape = (*shape[:-2], 128 * -(-shape[-2] // 128), shape[-1])
    q = quantize(jnp.zeros(shape), scaling=scaling)
    check_qtensor("x", q)
    assert q.shape == dequantize(q).shape == shape
    assert np.isfinite(float64(q.scale)).all()


def test_a_qtensor_passes_through_jit_and_tells_its_shape():
    q = jax.jit(lambda q: q)(QTensor(jnp.ones((3, 4), jnp.int8), jnp.ones((3, 1))))
    assert isinstance(q, QTensor)
    assert (q.shape, q.ndim, q.dtype) == ((3, 4), 2, jnp.int8)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.quick("float8_e4m3fn-grad", "float8_e5m2-<lambda>", "int8-jacfwd")
def test_differentiation_is_refused_with_advice(dtype, transform):
    with raises_saying(TypeError, "quantize()", "quantization=Quantization(...)", "jax.lax.stop_gradient"):
        transform(lambda x: dequantize(quantize(x, dtype)).sum())(jnp.ones((4, 4)))


def test_stop_gradient_allows_it():
    def loss(x):
        return (x * dequantize(quantize(jax.lax.stop_gradient(x)))).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.full((4, 4), 2.0)), 2.0)


@pytest.mark.parametrize(
    ("shape", "scaling", "expected"),
    [
        ((6, 256), "per_tensor", (1, 1)),
        ((6, 256), "per_row", (6, 1)),
        ((6, 256), "per_channel", (1, 256)),
        ((6, 256), "1x128", (6, 2)),
        ((4, 256, 384), "128x128", (4, 2, 3)),
        ((4, 256, 384), "per_tensor", (4, 1, 1)),
        ((2, 5, 30, 8), "10x4", (2, 5, 3, 2)),
    ],
)
def test_scale_shape(shape, scaling, expected):
    assert scale_shape(shape, scaling) == expected


def test_block_shape():
    assert block_shape("per_tensor") == (None, None)
    assert block_shape("per_row") == (1, None)
    assert block_shape("per_channel") == (None, 1)
    assert block_shape("16x32") == (16, 32)


@pytest.mark.parametrize("scaling", ["", "x", "1x", "x128", "0x128", "1x0", "axb", "1x128x2", "-1x8", "per_block"])
def test_unknown_scalings(scaling):
    message = ["unknown", "scaling", repr(scaling), "per_tensor, per_row, per_channel", "'1x128'"]
    with raises_saying(ValueError, *message):
        block_shape(scaling)
    with raises_saying(ValueError, *message):
        Quantization(lhs_scaling=scaling)
    with raises_saying(ValueError, *message):
        Quantization(rhs_scaling=scaling)


@pytest.mark.parametrize(
    ("x", "dtype", "scaling", "parts"),
    [
        (jnp.ones((4, 96)), "int8", "1x128", ["(4, 96)", "'1x128'", "96 is not divisible by 128", "'per_row'"]),
        (jnp.ones((100, 128)), "int8", "128x128", ["(100, 128)", "100 is not divisible by 128"]),
        (jnp.ones(128), "int8", "per_row", ["at least 2 dimensions", "(128,)"]),
        (jnp.ones((4, 4), jnp.int32), "int8", "per_row", ["x", "floating-point", "int32[4, 4]"]),
        (jnp.ones((4, 4), jnp.float8_e5m2), "int8", "per_row", ["x", "16-, 32- or 64-bit", "float8_e5m2[4, 4]"]),
        (jnp.ones((4, 4)), "bfloat16", "per_row", ["dtype", "float8_e4m3fn, float8_e5m2, int8", "got bfloat16"]),
        (jnp.ones((4, 4)), "uint8", "per_row", ["dtype", "got uint8"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(x, dtype, scaling, parts):
    with raises_saying(ValueError, *parts):
        quantize(x, dtype, scaling=scaling)


def test_dtypes_by_any_name():
    assert check_qdtype(jnp.float8_e4m3fn) == check_qdtype(np.dtype(ml_dtypes.float8_e4m3fn)) == "float8_e4m3fn"
    with raises_saying(ValueError, "dtype", "float8_e4m3fn, float8_e5m2, int8", "got float16"):
        Quantization("float16")


@pytest.mark.parametrize(
    ("values", "scale", "dtype", "parts"),
    [
        ((4, 8), (3, 1), "int8", ["weights", "scale [3, 1]", "values [4, 8]", "divide"]),
        ((4, 8), (0, 1), "int8", ["weights", "scale [0, 1]"]),
        ((4, 8), (4,), "int8", ["weights", "scale [4]", "same rank"]),
        ((4, 8), (4, 1), "float16", ["dtype", "got float16"]),
    ],
)
def test_scales_must_fit_their_values(values, scale, dtype, parts):
    with raises_saying(ValueError, *parts):
        check_qtensor("weights", QTensor(jnp.ones(values, dtype), jnp.ones(scale)))

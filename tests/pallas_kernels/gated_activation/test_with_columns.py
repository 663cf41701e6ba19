"""The pullback with columns in 8 bits: what every backend must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_activation.gradients import pulled, pulled_with_columns
from pallas_kernels.quantize import dequantize, quantize
from tests.helpers import LIMIT, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.gated_activation.pre_activations import assert_columns, by_jax, other_numbers, random

backend = every_backend("gated_activation")

E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
OPTIONS = {"activation": "silu", "limit": None, "in_8_bits": E5M2, "result_in_8_bits": E4M3, "with_weights": True}


def run(backend, *operands, **options):
    """For h, dout, weights of rows and sizes of groups."""

    def function(h, dout, row_weights, group_sizes):
        operands = {"h": h, "dout": dout, "row_weights": row_weights, "group_sizes": group_sizes}
        return pulled_with_columns(backend, **operands, **OPTIONS | options)

    return jax.jit(function)(*operands)


@pytest.mark.parametrize("weighed", [False, True], ids=["", "weighed"])
@pytest.mark.parametrize(
    "sizes",
    [[130, 0, 5, 97], [0, 256, 0], [1] * 8, [0, 0], [127, 129]],
    ids=["ragged", "whole", "tiny", "empty", "odd"],
)
@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.quick("xla-silu-ragged-weighed")
def test_rows_and_columns(backend, rng, activation, sizes, weighed):
    num_rows, limit = 272, 1.5 if activation == "swigluoai" else None
    h, dout = random(rng, (num_rows, 512), "bfloat16"), normal(rng, num_rows, 256, dtype="bfloat16")
    weights = normal(rng, num_rows) if weighed else None
    factor = jnp.ones(num_rows) if weights is None else weights
    owned = sum(sizes)
    bad = h.at[owned:].set(jnp.nan), dout.at[owned:].set(jnp.inf)
    options = {"activation": activation, "limit": limit, "with_weights": weighed}
    rows, dh, result, drow_weights = run(backend, *bad, weights, jnp.asarray(sizes), **options)
    value, _ = by_jax(h, dout, activation, limit)
    _, exact = by_jax(h, dout.astype(jnp.float32) * factor[:, None], activation, limit)
    assert_columns(dh, exact, sizes)
    assert_columns(result, value * factor[:, None], sizes)
    rounded = quantize(exact, E5M2, scaling="1x128")
    assert rows.dtype == E5M2
    np.testing.assert_allclose(rows.scale[:owned], rounded.scale[:owned], rtol=1e-5)
    if owned:
        assert other_numbers(*(jax.tree.map(lambda x: x[:owned], q) for q in (rows, rounded))) < 2e-3
    assert (drow_weights is None) == (not weighed)
    if drow_weights is not None:
        said = dequantize(quantize(value, E4M3, scaling="1x128"))  # what weights multiply
        expected = (dout.astype(jnp.float32) * said).sum(1)
        assert relative_error(drow_weights[:owned], expected[:owned]) < 1e-3  # of numbers halfway, some go elsewhere


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.quick("xla-*m3fn")
def test_rows_are_those_of_the_pullback_without_columns(backend, rng, dtype):
    h, dout = random(rng, (256, 512), "bfloat16"), normal(rng, 256, 256, dtype="bfloat16")
    weights, options = normal(rng, 256), {"activation": "silu", "limit": None, "with_weights": True}
    rows, *_, drow_weights = run(backend, h, dout, weights, jnp.asarray([100, 156]), in_8_bits=dtype)
    options |= {"with_array": False, "in_8_bits": dtype, "with_result": None, "result_in_8_bits": E4M3}
    _, expected, shares, _ = jax.jit(
        lambda h, dout, weights: pulled(backend, h=h, dout=dout, row_weights=weights, **options)
    )(h, dout, weights)
    if backend == "xla":
        np.testing.assert_allclose(rows.scale, expected.scale, rtol=1e-6)
        assert other_numbers(rows, expected) < 1e-4
    else:
        assert same_bits(rows, expected)
    assert relative_error(drow_weights, shares) < LIMIT["float32"]


@pytest.mark.quick("xla")
def test_a_bad_number_stays_in_its_row_and_in_its_blocks(backend, rng):
    h, dout = random(rng, (256, 512), "bfloat16"), normal(rng, 256, 256, dtype="bfloat16")
    rows, dh, result, _ = run(backend, h.at[140, 7].set(jnp.nan), dout, None, jnp.asarray([100, 156]))
    bad = np.isnan(rows.scale)
    assert bad[140].tolist() == [True, False, True, False]  # of gate and of up, the first 128 columns each
    assert bad.sum() == 2
    for columns, features in ((dh, [7, 256 + 7]), (result, [7])):
        assert np.argwhere(np.isnan(columns.scale[:3])).tolist() == [[1, feature] for feature in features]


def test_it_has_no_derivatives(rng):
    h, dout, sizes = random(rng, (128, 256), "bfloat16"), normal(rng, 128, 128, dtype="bfloat16"), jnp.asarray([128])
    with raises_saying(TypeError, "gated_activation", "second derivatives"):
        jax.jvp(lambda h: run("xla", h, dout, None, sizes)[0].scale, (h,), (h,))


def test_under_checkpoint_and_scan(rng):
    h, dout = random(rng, (2, 128, 256), "bfloat16"), normal(rng, 2, 128, 128, dtype="bfloat16")
    function = functools.partial(run, "auto")
    each = [function(h[i], dout[i], None, jnp.asarray([60, 68])) for i in range(2)]
    together = jax.lax.scan(lambda _, x: (None, function(*x, None, jnp.asarray([60, 68]))), None, (h, dout))[1]
    assert same_bits(together, jax.tree.map(lambda *x: jnp.stack(x), *each))

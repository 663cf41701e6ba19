"""The GPU kernels where there is no GPU: interpreted on the CPU against the reference, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_activation import reference
from pallas_kernels.gated_activation.formulas import value_of, with_derivatives
from pallas_kernels.gated_activation.gpu import Config, gated_activation, gated_activation_pullback
from tests.helpers import LIMIT, float64, normal, relative_error, same_bits
from tests.pallas_kernels.gated_activation.pre_activations import (
    ACTIVATIONS,
    CRUEL,
    by_jax,
    cruel,
    largest_error_of_a_row,
    other_numbers,
    random,
    widened,
)
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda

FP8 = "float8_e4m3fn"
SMALL = Config(rows=8, blocks_per_core=1)
ROWS, COLUMNS = 16, 256


def few_blocks(monkeypatch):
    """Several tiles for every block."""
    monkeypatch.setattr("pallas_kernels.gated_activation.gpu.rows._most_blocks", lambda chip, config: 3)


def forward(
    h, activation="silu", limit=None, out_dtype="bfloat16", in_8_bits=None, with_8_bits=True, config=SMALL, weights=None
):
    """What the kernel gives, and the reference."""
    options = {
        "activation": activation,
        "limit": limit,
        "out_dtype": out_dtype and jnp.dtype(out_dtype),
        "in_8_bits": in_8_bits and jnp.dtype(in_8_bits),
        "with_8_bits": with_8_bits and in_8_bits is not None,
    }
    with interpreted(detect_races=h.shape[0] % config.rows == 0):  # what two tiles share is written twice
        got = gated_activation(h, weights, **options, config=config)
    return got, jax.jit(functools.partial(reference.gated_activation, **options))(h, weights)


def backward(
    h,
    dout,
    activation="silu",
    limit=None,
    with_array=True,
    in_8_bits=None,
    config=SMALL,
    weights=None,
    with_result=None,
    result_in_8_bits=None,
):
    """The same for the pullback."""
    options = {
        "activation": activation,
        "limit": limit,
        "with_array": with_array,
        "in_8_bits": in_8_bits and jnp.dtype(in_8_bits),
        "with_weights": weights is not None,
        "with_result": with_result and jnp.dtype(with_result),
        "result_in_8_bits": result_in_8_bits and jnp.dtype(result_in_8_bits),
    }
    with interpreted(detect_races=h.shape[0] % config.rows == 0):
        got = gated_activation_pullback(h, dout, weights, **options, config=config)
    return got, jax.jit(functools.partial(reference.gated_activation_pullback, **options))(h, dout, weights)


def assert_alike(got, expected, limit, is_of_rounded=False):
    """Arrays by their norms; in 8 bits two of a thousand may be the other of two that are almost as near, none more.

    An array `is_of_rounded` numbers where it is what those in 8 bits stand for: it is compared where they are the same.
    """
    (array, rounded, *weights), (other, other_rounded, *other_weights) = got, expected
    assert (array is None, rounded is None) == (other is None, other_rounded is None)
    if array is not None:
        assert array.dtype == other.dtype
        is_same = True
        if is_of_rounded and rounded is not None:
            is_same = float64(rounded.values) == float64(other_rounded.values)
        assert relative_error(jnp.where(is_same, array, 0), jnp.where(is_same, other, 0)) < limit
    if rounded is not None:
        assert (rounded.dtype, rounded.scale.shape) == (other_rounded.dtype, other_rounded.scale.shape)
        np.testing.assert_allclose(rounded.scale, other_rounded.scale, rtol=1e-5)
        assert other_numbers(rounded, other_rounded) < 2e-3
        ours, theirs = widened(rounded), widened(other_rounded)
        a_step = 0.5 ** int(jnp.finfo(rounded.dtype).nmant) * np.maximum(np.abs(ours), np.abs(theirs))
        assert (np.abs(ours - theirs) <= a_step + 1e-4 * np.abs(theirs).max()).all()
    for one, another in zip(jax.tree.leaves(weights), jax.tree.leaves(other_weights), strict=True):
        assert relative_error(one, another) < LIMIT["float32"]


@pytest.mark.parametrize("weighed", [False, True], ids=["", "weighed"])
@pytest.mark.parametrize("in_8_bits", [None, FP8, "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.quick("silu-None-bfloat16-*m3fn-weighed", "swigluoai-1.5-float32-*m2-")
def test_interpreted(rng, monkeypatch, activation, limit, dtype, in_8_bits, weighed):
    few_blocks(monkeypatch)
    weights = normal(rng, ROWS) if weighed else None
    h, dout = random(rng, (ROWS, 2 * COLUMNS), dtype), normal(rng, ROWS, COLUMNS, dtype=dtype)
    found = forward(h, activation, limit, dtype, in_8_bits, weights=weights)
    assert_alike(*found, LIMIT[dtype], is_of_rounded=True)
    assert_alike(*backward(h, dout, activation, limit, True, in_8_bits, weights=weights), LIMIT[dtype])


@pytest.mark.parametrize("weighed", [False, True], ids=["", "weighed"])
@pytest.mark.parametrize("in_8_bits", [None, FP8, "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.quick("silu-bfloat16-*m3fn-weighed")
def test_the_result_with_the_pullback_interpreted(rng, activation, dtype, in_8_bits, weighed):
    """The bits that the forward kernel gives, whatever else is asked for, and that what is, is as without it."""
    weights = normal(rng, ROWS) if weighed else None
    h, dout = random(rng, (ROWS, 2 * COLUMNS), dtype), normal(rng, ROWS, COLUMNS, dtype="bfloat16")
    (array, _), _ = forward(h, activation, 1.5, "bfloat16", in_8_bits, with_8_bits=False, weights=weights)
    options = {"activation": activation, "limit": 1.5, "weights": weights}
    options |= {"with_result": "bfloat16", "result_in_8_bits": in_8_bits}
    for asked in ({"with_array": True}, {"with_array": False, "in_8_bits": "float8_e5m2"}):
        got, expected = backward(h, dout, **options, **asked)
        assert same_bits(got[3], array)
        without, _ = backward(h, dout, **options | {"with_result": None}, **asked)
        assert same_bits(got[:3], without[:3])
        assert relative_error(got[3], expected[3]) < (LIMIT["bfloat16"] if in_8_bits is None else 5e-3)


@pytest.mark.parametrize(("array", "rounded"), [(True, False), (False, True)])
@pytest.mark.slow
def test_some_of_the_results_interpreted(rng, array, rounded):
    h, dout = random(rng, (ROWS, 2 * COLUMNS), "bfloat16"), normal(rng, ROWS, COLUMNS, dtype="bfloat16")
    out_dtype = "bfloat16" if array else None
    assert_alike(*forward(h, out_dtype=out_dtype, in_8_bits=FP8, with_8_bits=rounded), LIMIT["bfloat16"])
    assert_alike(*backward(h, dout, with_array=array, in_8_bits=FP8 if rounded else None), LIMIT["bfloat16"])


@pytest.mark.parametrize("config", [SMALL, Config(rows=32, blocks_per_core=1)], ids=["small", "large"])
@pytest.mark.parametrize(("rows", "columns"), [(37, 128), (8, 384), (33, 192), (9, 64)], ids=str)
@pytest.mark.quick("33-192-large")
def test_awkward_sizes_interpreted(rng, monkeypatch, rows, columns, config):
    """The last tiles of rows that no tile divides, fewer rows than a tile has, and columns that have no scale."""
    few_blocks(monkeypatch)
    h, dout = random(rng, (rows, 2 * columns), "bfloat16"), normal(rng, rows, columns, dtype="bfloat16")
    options = {"in_8_bits": FP8 if columns % 128 == 0 else None, "config": config, "weights": normal(rng, rows)}
    array = forward(h, **options)
    assert_alike(*array, LIMIT["bfloat16"])
    result = {"with_result": "bfloat16", "result_in_8_bits": options["in_8_bits"]}
    pulled = backward(h, dout, **options, **result)
    assert_alike(*(found[:3] for found in pulled), LIMIT["bfloat16"])
    assert same_bits(pulled[0][3], array[0][0])


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CRUEL)
@pytest.mark.quick("nan-silu-None", "at the limit-swigluoai-7.0")
def test_cruel_values_interpreted(rng, case, activation, limit):
    h, dout = cruel(rng, case, 8, 128, "float32"), normal(rng, 8, 128)
    got, expected = forward(h, activation, limit, "float32", FP8)
    np.testing.assert_allclose(got[1].scale, expected[1].scale, rtol=2e-5)
    same = widened(got[1]), widened(expected[1])
    np.testing.assert_array_equal(np.isnan(same[0]), np.isnan(same[1]))
    assert relative_error(*(np.nan_to_num(x) for x in same)) < 5e-3
    got, expected = backward(h, dout, activation, limit, True, FP8)
    assert largest_error_of_a_row(got[0], expected[0]) < 5 * LIMIT["float32"]  # 1 − tanh² cancels in the reference
    np.testing.assert_allclose(got[1].scale, expected[1].scale, rtol=2e-5)


@pytest.mark.slow
def test_garbage_behind_the_rows_in_use_stays_there_interpreted(rng):
    h, dout = random(rng, (ROWS, 2 * COLUMNS), "bfloat16"), normal(rng, ROWS, COLUMNS, dtype="bfloat16")
    bad = h.at[9:].set(jnp.nan), dout.at[9:].set(jnp.inf)
    options = {"in_8_bits": FP8, "weights": jnp.ones(ROWS)}
    for clean, dirty in (
        (forward(h, **options)[0], forward(bad[0], **options)[0]),
        (backward(h, dout, **options)[0], backward(*bad, **options)[0]),
    ):
        assert same_bits(*(jax.tree.map(lambda x: x[:9], results) for results in (clean, dirty)))


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.quick("*-7.0")
def test_formulas(rng, activation, limit):
    """Those of the kernels, against `jax.vjp` of the activations; at the limit too, of which half passes."""
    h = 4 * normal(rng, 64, 256)
    h = h.at[0].set(7.0).at[1].set(-7.0).at[2].set(0.0)
    gate, up = jnp.split(h, 2, axis=1)
    value, dh = by_jax(h, jnp.ones((64, 128)), activation, limit)
    found = jax.jit(with_derivatives, static_argnums=(2, 3))(gate, up, activation, limit)
    assert relative_error(found.value, value) < LIMIT["float32"]
    assert relative_error(jnp.concatenate([found.by_gate, found.by_up], 1), dh) < LIMIT["float32"]
    assert relative_error(value_of(gate, up, activation, limit), float64(value)) < LIMIT["float32"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(131072, 768, "bfloat16"), (1001, 2880, "bfloat16"), (32768, 2048, "float32"), (9, 128, "float16")],
    ids=str,
)
@pytest.mark.quick("131072-*-silu")
def test_lowers_for_cuda(rows, columns, dtype, activation):
    h, dout = jax.ShapeDtypeStruct((rows, 2 * columns), dtype), jax.ShapeDtypeStruct((rows, columns), "bfloat16")
    options = {"activation": activation, "limit": 7.0, "in_8_bits": None if columns % 128 else jnp.dtype(FP8)}
    weights = jax.ShapeDtypeStruct((rows,), "float32")
    kernel = functools.partial(gated_activation, out_dtype=jnp.dtype(dtype), with_8_bits=columns % 128 == 0)
    pullback = functools.partial(
        gated_activation_pullback,
        with_array=True,
        with_result=jnp.dtype("bfloat16"),
        result_in_8_bits=options["in_8_bits"],
    )
    lower_for_cuda(functools.partial(kernel, **options), h, None)
    lower_for_cuda(functools.partial(kernel, **options), h, weights)
    lower_for_cuda(functools.partial(pullback, with_weights=False, **options), h, dout, None)
    lower_for_cuda(functools.partial(pullback, with_weights=True, **options), h, dout, weights)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "in_8_bits"),
    [(16, 128, "float32", "int8"), (16, 100, "float32", None), (0, 128, "float32", FP8), (7, 128, "bfloat16", None)],
    ids=str,
)
@pytest.mark.quick("7-*")
def test_what_is_left_to_xla(rng, rows, columns, dtype, in_8_bits):
    """The very bits of the reference, wherever this runs."""
    h, dout = random(rng, (rows, 2 * columns), dtype), normal(rng, rows, columns)
    assert same_bits(*forward(h, in_8_bits=in_8_bits))
    assert same_bits(*backward(h, dout, in_8_bits=in_8_bits))
    assert same_bits(*backward(h, dout, with_result="float32", result_in_8_bits=in_8_bits))

"""What every backend must give, against formulas in float64 and `jax.vjp`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import gated_halves
from pallas_kernels.gated_activation import gated_activation, gated_activation_in_8_bits, gradients
from pallas_kernels.gated_activation.gradients import pulled
from pallas_kernels.quantize import dequantize, quantize
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
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
from tests.pallas_kernels.grouped_matmul.grouped import gated, gated_gradient

backend = every_backend("gated_activation")

FP8 = "float8_e4m3fn"
NAMES = ("h", "dout", "row_weights")


def run(function, backend, **options):
    return jax.jit(functools.partial(function, backend=backend, **options))


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((37, 768), "float32"), ((130, 512), "bfloat16"), ((8, 192), "float16"), ((3, 50), "float32")]
)
@pytest.mark.quick("xla-shape0-float32-silu-None", "xla-*bfloat16-swigluoai-2.0")
def test_values_and_gradients(backend, rng, shape, dtype, activation, limit):
    h = random(rng, shape, dtype)
    dout = normal(rng, shape[0], shape[1] // 2, dtype=dtype)
    options = {"activation": activation, "activation_limit": limit}
    out, pull = jax.vjp(run(gated_activation, backend, **options), h)
    wide = float64(h)
    assert out.dtype == dtype
    assert relative_error(out, gated(*np.split(wide, 2, axis=1), activation, limit)) < LIMIT[dtype]
    near_edge = np.zeros(wide.shape, bool) if limit is None else np.abs(np.abs(wide) - limit) < 1e-4
    expected = gated_gradient(wide, float64(dout), activation, limit)
    expected[near_edge] = float64(by_jax(h, dout, activation, limit)[1])[near_edge]
    (dh,) = pull(dout)
    assert dh.dtype == dtype
    assert relative_error(dh, expected) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [FP8, "float8_e5m2", "int8"])
@pytest.mark.parametrize("shape", [(37, 768), (130, 256)], ids=str)
@pytest.mark.quick("xla-(37, 768)-*m3fn")
def test_in_8_bits_is_the_float32_value_rounded_once(backend, rng, shape, dtype):
    h = random(rng, shape, "bfloat16")
    got = run(gated_activation_in_8_bits, backend, dtype=dtype)(h)
    exact = by_jax(h, jnp.zeros((shape[0], shape[1] // 2)), "silu", None)[0]
    expected = jax.jit(functools.partial(quantize, dtype=dtype, scaling="1x128"))(exact)
    assert got.in_8_bits.dtype == dtype
    np.testing.assert_allclose(got.in_8_bits.scale, expected.scale, rtol=2e-6)
    if dtype != "int8":
        assert other_numbers(got.in_8_bits, expected) < 1e-3
    assert relative_error(widened(got.in_8_bits), widened(expected)) < 5e-3
    assert same_bits(got.array, jnp.asarray(widened(got.in_8_bits), jnp.float32).astype(h.dtype))


@pytest.mark.parametrize("dtype", [FP8, "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float32"])
@pytest.mark.quick("xla-bfloat16-*m3fn")
def test_a_pullback_in_8_bits(backend, rng, of, dtype):
    h, dout = random(rng, (37, 512), of), normal(rng, 37, 256, dtype=of)
    options = {"activation": "silu", "limit": None, "with_array": True, "in_8_bits": jnp.dtype(dtype)}
    options |= {"row_weights": None, "with_weights": False, "with_result": None, "result_in_8_bits": None}
    dh, rounded, _, _ = jax.jit(lambda h, dout: pulled(backend, h=h, dout=dout, **options))(h, dout)
    exact = by_jax(h, dout, "silu", None)[1]
    assert relative_error(dh, exact) < LIMIT[of]
    expected = jax.jit(functools.partial(quantize, dtype=dtype, scaling="1x128"))(exact)
    np.testing.assert_allclose(rounded.scale, expected.scale, rtol=1e-5)
    assert other_numbers(rounded, expected) < 1e-3


@pytest.mark.parametrize("weighed", [False, True], ids=["", "weighed"])
@pytest.mark.parametrize("in_8_bits", [None, FP8, "float8_e5m2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.quick("xla-silu-None-", "xla-swigluoai-*m3fn-weighed")
def test_a_pullback_gives_the_result_once_more(backend, rng, activation, in_8_bits, weighed):
    """With the bits of the first time; XLA fuses it with other things, so that a last bit may be another."""
    h, dout = random(rng, (37, 512), "bfloat16"), normal(rng, 37, 256)
    weights = normal(rng, 37) if weighed else None
    if in_8_bits is None:
        expected = run(gated_activation, backend, activation=activation)(h, weights)
    else:
        expected = run(gated_activation_in_8_bits, backend, activation=activation, dtype=in_8_bits)(h, weights).array
    options = {"activation": activation, "limit": None, "with_array": True, "in_8_bits": jnp.dtype("float8_e5m2")}
    options |= {"with_weights": weighed, "with_result": h.dtype, "result_in_8_bits": in_8_bits and jnp.dtype(in_8_bits)}
    *_, result = jax.jit(lambda *args: pulled(backend, **dict(zip(NAMES, args, strict=True)), **options))(
        h, dout, weights
    )
    if backend == "xla":
        assert relative_error(result, expected) < (1e-4 if in_8_bits is None else LIMIT["bfloat16"])
    else:
        assert same_bits(result, expected)


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CRUEL)
@pytest.mark.quick("xla-nan-silu-None")
def test_what_is_cruel_stays_in_its_row(backend, rng, case, activation, limit):
    h, dout = cruel(rng, case, 8, 256, "bfloat16"), normal(rng, 8, 256)
    options = {"activation": activation, "activation_limit": limit}
    value, dh = by_jax(h, dout, activation, limit)
    rounded = run(gated_activation_in_8_bits, backend, **options)(h)
    got, pull = jax.vjp(run(gated_activation, backend, **options, out_dtype="float32"), h)
    assert largest_error_of_a_row(got, value) < LIMIT["float32"]
    assert largest_error_of_a_row(pull(dout)[0], dh) < LIMIT["bfloat16"]
    bad = ~np.isfinite(np.asarray(value)).reshape(8, 2, 128).all(2)
    np.testing.assert_array_equal(np.isnan(rounded.in_8_bits.scale), bad)
    np.testing.assert_array_equal(np.isnan(float64(rounded.array)), np.repeat(bad, 128, axis=1))
    assert not bad[[0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.quick("xla")
def test_gradients_pass_the_rounding(backend, rng):
    h, dout = random(rng, (16, 512), "float32"), normal(rng, 16, 256)
    in_8_bits = run(gated_activation_in_8_bits, backend)
    _, pull = jax.vjp(lambda h: in_8_bits(h).array, h)
    assert relative_error(pull(dout)[0], by_jax(h, dout, "silu", None)[1]) < LIMIT["float32"]


@pytest.mark.parametrize("moving", ["both", "h", "weights"])
@pytest.mark.quick("xla-both")
def test_weights_of_rows(backend, rng, moving):
    h, weights, dout = random(rng, (37, 512), "float32"), normal(rng, 37), normal(rng, 37, 256)

    def derivatives(function):
        """The result, the cotangents, and the tangent."""

        def of(at):
            return function(at.get("h", h), at.get("weights", weights))

        at = {name: x for name, x in (("h", h), ("weights", weights)) if moving in ("both", name)}
        y, pull = jax.vjp(of, at)
        return y, pull(dout), jax.jvp(of, (at,), (jax.tree.map(jnp.cos, at),))[1]

    got, expected = (
        jax.jit(lambda f=f: derivatives(f))()
        for f in (
            functools.partial(gated_activation, backend=backend),
            lambda h, weights: gated_halves(h, "silu") * weights[:, None],
        )
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < LIMIT["float32"]
    in_8_bits = run(gated_activation_in_8_bits, backend)(h, weights)
    assert relative_error(in_8_bits.array, expected[0]) < 0.05


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.quick("xla-silu")
def test_second_derivatives(backend, rng, activation):
    h, direction = normal(rng, 16, 256), normal(rng, 16, 256)

    def hvps(function):
        gradient = jax.grad(lambda h: jnp.sin(function(h)).sum())
        along = jax.grad(lambda h: (gradient(h) * direction).sum())
        return jax.jit(lambda h: (jax.jvp(gradient, (h,), (direction,))[1], along(h)))(h)

    ours = hvps(functools.partial(gated_activation, activation=activation, backend=backend))
    plain = hvps(functools.partial(gated_halves, activation=activation))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, plain, strict=True))


@pytest.mark.quick("xla")
def test_under_transformations(backend, rng):
    h = random(rng, (3, 16, 512), "bfloat16")
    function = run(gated_activation_in_8_bits, backend)
    each = [function(x) for x in h]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert same_bits(jax.jit(jax.vmap(function))(h), stacked)
    assert same_bits(jax.jit(lambda h: jax.lax.scan(lambda _, x: (None, function(x)), None, h)[1])(h), stacked)

    def gradient(wrap):
        return jax.jit(jax.grad(wrap(lambda h: function(h).array.astype(jnp.float32).sum())))(h[0])

    assert same_bits(gradient(jax.checkpoint), gradient(lambda f: f))


@pytest.mark.quick("xla")
def test_no_rows(backend):
    h = jnp.zeros((0, 512), jnp.bfloat16)
    out, pull = jax.vjp(lambda h: gated_activation_in_8_bits(h, backend=backend).array, h)
    assert out.shape == (0, 256)
    assert pull(out)[0].shape == (0, 512)


def test_nobody_writes_what_nobody_uses():
    def writes(function, name):
        lowered = jax.jit(function).trace(jax.ShapeDtypeStruct((64, 512), jnp.bfloat16))
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        [call] = [
            line for line in text.splitlines() if f'"{name}"' in line or (name in line and "custom_call @" in line)
        ]
        return call.rpartition("->")[2]

    def pull(of):
        def function(h):
            options = {"activation": "silu", "limit": None, "with_array": True, "in_8_bits": jnp.dtype(FP8)}
            options |= {"row_weights": h[:, 0].astype("float32"), "with_weights": True}
            options |= {"with_result": h.dtype, "result_in_8_bits": jnp.dtype(FP8)}
            return of(pulled("auto", h=h, dout=h[:, :256], **options))

        return function

    array, values, scale = "tensor<64x256xbf16>", "tensor<64x256xf8E4M3FN>", "tensor<2x64xf32>"
    everything = writes(gated_activation_in_8_bits, "gated_activation")
    assert all(part in everything for part in (array, values, scale))
    assert array not in writes(lambda h: gated_activation_in_8_bits(h).in_8_bits, "gated_activation")
    only_array = writes(lambda h: gated_activation_in_8_bits(h).array, "gated_activation")
    assert array in only_array
    assert values not in only_array
    parts = "tensor<64x512xbf16>", "tensor<64x512xf8E4M3FN>", "tensor<2x64xf32>", array  # of dh, of weights, the result
    everything = writes(pull(lambda found: found), "gated_activation_pullback")
    assert all(part in everything for part in parts)
    for i, part in enumerate(parts):
        only = writes(pull(lambda found, i=i: found[i]), "gated_activation_pullback")
        assert [other in only for other in parts] == [other == part for other in parts]


@pytest.mark.parametrize(
    ("function", "h", "options", "parts"),
    [
        (gated_activation, jnp.ones(8), {}, ["h", "[R, 2I]", "[8]"]),
        (gated_activation, jnp.ones((2, 7)), {}, ["h", "[R, 2I]", "[2, 7]"]),
        (gated_activation, jnp.ones((2, 8), jnp.int8), {}, ["h", "floating point", "int8"]),
        (gated_activation, jnp.ones((2, 8)), {"activation": "swiglu"}, ["activation", "'swiglu'", "silu"]),
        (gated_activation, jnp.ones((2, 8)), {"row_weights": jnp.ones(3)}, ["row_weights", "[R] = [2]", "[3]"]),
        (gated_activation_in_8_bits, jnp.ones((2, 384)), {}, ["192", "128"]),
        (gated_activation_in_8_bits, jnp.ones((2, 256)), {"dtype": "int4"}, ["dtype", "int8", "int4"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(function, h, options, parts):
    with raises_saying(ValueError, *parts):
        function(h, **options)


@pytest.mark.parametrize("with_result", [None, jnp.dtype("bfloat16")], ids=["", "result"])
@pytest.mark.quick("xla-", "pallas_gpu-result")
def test_weights_multiply_what_was_rounded(backend, rng, with_result):
    h, dout, weights = random(rng, (40, 512), "bfloat16"), normal(rng, 40, 256, dtype="bfloat16"), normal(rng, 40)
    options = {"activation": "silu", "limit": None}
    rounds_to = jnp.dtype(FP8)
    _, said = gradients.gated(
        backend, h=h, row_weights=None, out_dtype=None, in_8_bits=rounds_to, with_8_bits=True, **options
    )
    options |= {"with_array": False, "in_8_bits": None, "with_weights": True, "result_in_8_bits": rounds_to}
    _, _, drow_weights, _ = pulled(backend, h=h, dout=dout, row_weights=weights, with_result=with_result, **options)
    expected = (dout.astype(jnp.float32) * dequantize(said)).sum(1)
    assert relative_error(drow_weights, expected) < LIMIT["float32"]

"""What every backend must give: the bits of `quantize`, in both layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import quantize
from pallas_kernels.quantize_transpose import quantize_transpose
from tests.helpers import float64, raises_saying, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.quantize_transpose.weights import CRUEL, cruel, random

backend = every_backend("quantize_transpose")


def expected(weights, dtype):
    """Both layouts. Jitted, as XLA divides in another way where it compiles operations one by one."""
    rounded = jax.jit(functools.partial(quantize, dtype=dtype, scaling="128x128"))(weights)
    return rounded.mT, rounded


def run(backend, weights, dtype, **options):
    return jax.jit(lambda w: quantize_transpose(w, dtype, backend=backend, **options))(weights)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(3, 256, 384), (1, 128, 128), (2, 128, 640), (5, 512, 128)], ids=str)
@pytest.mark.quick("xla-(3, 256, 384)-bfloat16-*", "xla-(1, 128, 128)-float32-float8_e4m3fn")
def test_values(backend, rng, shape, of, dtype):
    weights = random(rng, shape, of)
    assert same_bits(run(backend, weights, dtype), expected(weights, dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CRUEL)
@pytest.mark.quick("xla-nan-bfloat16-*", "xla-zeros-float16-*m3fn", "xla-subnormal-float32-*m2")
def test_cruel_values(backend, rng, case, of, dtype):
    weights = cruel(rng, case, of)
    got, reference = run(backend, weights, dtype), expected(weights, dtype)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(float64(ours), float64(theirs))  # the sign of a NaN is left open
    rest = np.ones((2, 3), bool)
    rest[0, 1] = case not in ("nan", "infinity", "minus infinity")
    np.testing.assert_array_equal(np.isfinite(got[1].scale[1]), rest)
    if case.endswith("zeros") or (case == "subnormal" and of != "float16"):
        assert got[1].scale[1, 0, 1] == 1


@pytest.mark.parametrize(("k_major", "n_last"), [(True, False), (False, True)])
@pytest.mark.quick("xla-*")
def test_one_layout_alone(backend, rng, k_major, n_last):
    weights = random(rng, (2, 256, 128), "bfloat16")
    got = run(backend, weights, "float8_e4m3fn", k_major=k_major, n_last=n_last)
    both = expected(weights, "float8_e4m3fn")
    assert same_bits(got, tuple(x if there else None for x, there in zip(both, (k_major, n_last), strict=True)))


@pytest.mark.slow
def test_as_large_as_a_layer(backend, rng):
    weights = random(rng, (16, 2048, 1536), "bfloat16")
    assert same_bits(run(backend, weights, "float8_e4m3fn"), expected(weights, "float8_e4m3fn"))


def test_nobody_writes_a_layout_that_nobody_uses():
    def writes(function):
        lowered = jax.jit(function).trace(jax.ShapeDtypeStruct((2, 128, 256), jnp.bfloat16))
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        [call] = [line for line in text.splitlines() if "quantize_transpose" in line and "custom_call @" in line]
        return call.rpartition("->")[2]

    k_major, n_last = "tensor<512x128xf8E4M3FN>", "tensor<128x512xf8E4M3FN>"
    for backend in ("auto", "pallas_gpu"):
        of = functools.partial(quantize_transpose, backend=backend)
        assert all(layout in writes(of) for layout in (k_major, n_last))
        assert n_last not in writes(lambda w, of=of: of(w)[0])
        assert k_major not in writes(lambda w, of=of: of(w)[1].values)
        assert k_major in writes(lambda w, of=of: of(w)[0].scale)  # a layout goes with its scales


def test_under_transformations(backend, rng):
    weights = random(rng, (4, 128, 256), "float32")
    both = functools.partial(quantize_transpose, backend=backend)
    reference = expected(weights, "float8_e4m3fn")
    mapped = jax.jit(jax.vmap(lambda w: both(w[None])))(weights)
    assert same_bits(jax.tree.map(lambda x: x[:, 0], mapped), reference)
    checkpointed = jax.jit(jax.checkpoint(both))(weights)
    assert same_bits(checkpointed, reference)
    scanned = jax.jit(lambda w: jax.lax.scan(lambda _, x: (None, both(x[None])), None, w)[1])(weights)
    assert same_bits(jax.tree.map(lambda x: x[:, 0], scanned), reference)


def test_no_gradient_passes(rng):
    weights = random(rng, (1, 128, 128), "float32")
    with raises_saying(TypeError, "quantize_transpose", "stop_gradient"):
        jax.grad(lambda w: quantize_transpose(w)[0].scale.sum())(weights)


@pytest.mark.parametrize(
    ("weights", "options", "parts"),
    [
        (jnp.ones((128, 128)), {}, ["weights", "[G, K, N]", "[128, 128]"]),
        (jnp.ones((1, 128, 128), jnp.int8), {}, ["weights", "floating point", "int8"]),
        (jnp.ones((1, 128, 192)), {}, ["192", "128"]),
        (jnp.ones((1, 128, 128)), {"dtype": "int4"}, ["dtype", "int8", "int4"]),
        (jnp.ones((1, 128, 128)), {"k_major": False, "n_last": False}, ["k_major", "n_last", "False"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(weights, options, parts):
    with raises_saying(ValueError, *parts):
        quantize_transpose(weights, **options)

"""The kernel that pulls back with columns in 8 bits where there is no GPU: interpreted, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_activation import reference
from pallas_kernels.gated_activation.gpu import gated_activation_pullback, gated_activation_pullback_with_columns
from pallas_kernels.gated_activation.gpu.with_columns import Config
from pallas_kernels.on_gpu.smem import single_view
from tests.helpers import LIMIT, normal, relative_error, same_bits
from tests.pallas_kernels.gated_activation.pre_activations import assert_columns, by_jax, other_numbers, random
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda

E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")


def programs(monkeypatch, count):
    """As many blocks of threads, each of which has several tiles."""
    monkeypatch.setattr("pallas_kernels.gated_activation.gpu.with_columns._most_programs", lambda chip: count)


def both(rng, sizes, num_rows, columns, *, config, races, activation="silu", dtype="bfloat16", weighed=True, **options):
    """Checks what the kernel gives by columns, and returns what it and the reference give by rows, of those owned."""
    h, dout = random(rng, (num_rows, 2 * columns), dtype), normal(rng, num_rows, columns, dtype=dtype)
    weights, owned = normal(rng, num_rows) if weighed else None, sum(sizes)
    limit = 1.5 if activation == "swigluoai" else None
    options = {"in_8_bits": E5M2, "result_in_8_bits": E4M3} | options
    options |= {"activation": activation, "limit": limit, "with_weights": weighed}
    operands = h.at[owned:].set(jnp.nan), dout.at[owned:].set(jnp.inf), weights, jnp.asarray(sizes)
    with single_view(True), interpreted(detect_races=races):
        rows, dh, result, *drow_weights = gated_activation_pullback_with_columns(*operands, **options, config=config)
    expected, _, _, *others = jax.jit(functools.partial(reference.gated_activation_pullback_with_columns, **options))(
        *operands
    )
    factor = jnp.ones((num_rows, 1)) if weights is None else weights[:, None]
    value, _ = by_jax(h, dout, activation, limit)
    assert_columns(result, value * factor, sizes)
    assert_columns(dh, by_jax(h, dout.astype(jnp.float32) * factor, activation, limit)[1], sizes)
    for one, other in zip(jax.tree.leaves(drow_weights), jax.tree.leaves(others), strict=True):
        assert relative_error(one[:owned], other[:owned]) < LIMIT["float32"]
    return [jax.tree.map(lambda x: x[:owned], q) for q in (rows, expected)]


def assert_rows(rows, expected):
    np.testing.assert_allclose(rows.scale, expected.scale, rtol=1e-5)
    assert rows.dtype == expected.dtype
    assert other_numbers(rows, expected) < 2e-3


@pytest.mark.parametrize("config", [Config(2), Config(4)], ids=["2", "4"])
@pytest.mark.parametrize("weighed", [False, True], ids=["", "weighed"])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)], ids=["alike", "mixed"])
@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.slow
def test_whole_blocks_interpreted(rng, monkeypatch, activation, formats, weighed, config):
    """Nothing is stored twice, so that whatever is, and what is read too early, is an error."""
    programs(monkeypatch, 1)
    options = {"activation": activation, "weighed": weighed, "config": config}
    options |= dict(zip(("in_8_bits", "result_in_8_bits"), formats, strict=True))
    assert_rows(*both(rng, [128, 0, 128], 256, 256, races=True, **options))


@pytest.mark.parametrize("config", [Config(2), Config(4)], ids=["2", "4"])
@pytest.mark.parametrize(
    ("sizes", "num_rows"),
    [
        ([37, 0, 130, 5, 77], 301),  # blocks that begin at odd rows, and an empty group
        ([37, 0, 263], 300),  # one whose block goes on past the last row
        ([129, 1], 130),  # one that begins with the last row
        ([0, 0, 3], 128),  # few rows of many
        ([0, 0], 128),  # none
        ([255], 256),
    ],
    ids=["odd", "beyond", "last row", "few", "none", "one short"],
)
@pytest.mark.quick("odd-4")
def test_ragged_groups_interpreted(rng, monkeypatch, sizes, num_rows, config):
    programs(monkeypatch, 3)
    rows, expected = both(rng, sizes, num_rows, 128, races=False, config=config)
    if sum(sizes):
        assert_rows(rows, expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", [Config(2), Config(4)], ids=["2", "4"])
def test_float16_interpreted(rng, config):
    assert_rows(*both(rng, [60, 68], 128, 128, races=False, config=config, dtype="float16"))


@pytest.mark.slow
def test_rows_have_the_bits_of_the_pullback_by_rows_interpreted(rng):
    h, dout = random(rng, (256, 256), "bfloat16"), normal(rng, 256, 128, dtype="bfloat16")
    options = {"activation": "silu", "limit": None, "in_8_bits": E4M3, "with_weights": True, "result_in_8_bits": E4M3}
    weights = normal(rng, 256)
    with single_view(True), interpreted(detect_races=False):
        rows, *_ = gated_activation_pullback_with_columns(h, dout, weights, jnp.asarray([99, 157]), **options)
        _, expected, *_ = gated_activation_pullback(h, dout, weights, **options, with_array=False, with_result=None)
    assert_rows(rows, expected)
    assert relative_error(rows.scale, expected.scale) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "columns"), [(131072, 768), (4098, 2048)], ids=str)
@pytest.mark.quick("131072-*-silu")
def test_lowers_for_cuda(rows, columns, activation):
    operands = [
        jax.ShapeDtypeStruct((rows, 2 * columns), "bfloat16"),
        jax.ShapeDtypeStruct((rows, columns), "bfloat16"),
        jax.ShapeDtypeStruct((rows,), "float32"),
        jax.ShapeDtypeStruct((128,), "int32"),
    ]
    options = {"activation": activation, "limit": 7.0, "in_8_bits": E5M2, "result_in_8_bits": E4M3}
    for with_weights in (True, False):
        kernel = functools.partial(gated_activation_pullback_with_columns, **options, with_weights=with_weights)
        lower_for_cuda(kernel, *operands[:2], operands[2] if with_weights else None, operands[3])


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "in_8_bits"),
    [(127, 128, "bfloat16", E4M3), (130, 128, "float32", E4M3), (128, 128, "bfloat16", jnp.dtype("int8"))],
    ids=str,
)
@pytest.mark.slow
def test_what_is_left_to_xla(rng, rows, columns, dtype, in_8_bits):
    """The very bits of the reference, wherever this runs."""
    operands = random(rng, (rows, 2 * columns), dtype), normal(rng, rows, columns, dtype=dtype), None, jnp.asarray([60])
    options = {"activation": "silu", "limit": None, "in_8_bits": in_8_bits, "result_in_8_bits": in_8_bits}
    functions = gated_activation_pullback_with_columns, reference.gated_activation_pullback_with_columns
    assert same_bits(*(function(*operands, **options, with_weights=True) for function in functions))

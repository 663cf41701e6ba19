import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.plan import gpu as kernels
from pallas_kernels.plan.counting_sort import counting_sort
from pallas_kernels.plan.gpu import many
from tests.helpers import same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda

backend = every_backend("plan")

# Keys, groups: one key, less than a tile, a tile, what no tile divides, the greatest that are all compared, chunks.
SHAPES = [(1, 1), (5, 3), (64, 64), (67, 5), (96, 130), (512, 128), (4096, 8), (4097, 300), (131072, 128)]


def expected(keys, num_groups):
    """One key after the other."""
    valid = (keys >= 0) & (keys < num_groups)
    order = np.full(len(keys), -1)
    in_order = np.flatnonzero(valid)[np.argsort(keys[valid], kind="stable")]
    order[: len(in_order)] = in_order
    rows = np.full(len(keys), -1)
    rows[in_order] = np.arange(len(in_order))
    return rows, order, np.bincount(keys[valid], minlength=num_groups)


def check(keys, num_groups, backend):
    result = jax.jit(functools.partial(counting_sort, num_groups=num_groups, backend=backend))(keys)
    for field, right in zip(result, expected(np.asarray(keys), num_groups), strict=True):
        assert field.dtype == jnp.int32
        np.testing.assert_array_equal(field, right)


@pytest.mark.parametrize(("num_keys", "num_groups"), SHAPES)
def test_equals_a_stable_sort(backend, rng, num_keys, num_groups):
    check(jnp.asarray(rng.integers(-1, num_groups + 1, num_keys), jnp.int32), num_groups, backend)


@pytest.mark.parametrize("num_keys", [300, 5000])
@pytest.mark.parametrize("key", [0, 4, -1, 7])
@pytest.mark.quick("xla--1-300", "xla-0-5000", "xla-4-300", "xla-7-5000", "pallas_gpu*")
def test_all_keys_the_same(backend, num_keys, key):
    check(jnp.full(num_keys, key, jnp.int32), 5, backend)


@pytest.mark.parametrize("key", [np.iinfo(np.int32).min, np.iinfo(np.int32).max])
def test_extreme_keys_have_no_row(backend, key):
    check(jnp.full(70, key, jnp.int32).at[3].set(1), 5, backend)


def test_no_keys(backend):
    rows, order, sizes = counting_sort(jnp.zeros(0, jnp.int32), 3, backend=backend)
    assert rows.shape == order.shape == (0,)
    assert sizes.tolist() == [0, 0, 0]


def test_same_inputs_same_bits(backend, rng):
    keys = jnp.asarray(rng.integers(0, 64, 6000), jnp.int32)
    sort = jax.jit(lambda keys: counting_sort(keys, 64, backend=backend))
    assert same_bits(sort(keys), sort(keys))


@pytest.mark.parametrize(("dtype", "num_groups"), [("uint8", 256), ("uint8", 300), ("int8", 200), ("uint32", 4)])
def test_keys_of_every_integer_dtype(rng, dtype, num_groups):
    keys = rng.integers(0, np.iinfo(dtype).max, 100, dtype, endpoint=True)
    keys[:3] = np.iinfo(dtype).max, np.iinfo(dtype).min, 3
    result = counting_sort(jnp.asarray(keys), num_groups, backend="xla")
    for field, right in zip(result, expected(keys.astype(np.int64), num_groups), strict=True):
        assert field.dtype == jnp.int32
        np.testing.assert_array_equal(field, right)


@pytest.mark.parametrize(
    ("keys", "num_groups", "message"),
    [
        (jnp.zeros((2, 2), jnp.int32), 2, r"integer vector \[N\], got int32\[2, 2\]"),
        (jnp.zeros(2), 2, r"integer vector \[N\], got float32\[2\]"),
        (jnp.zeros(2, jnp.int32), 0, "at least 1, got 0"),
    ],
)
def test_errors(keys, num_groups, message):
    with pytest.raises(ValueError, match=message):
        counting_sort(keys, num_groups)


@pytest.mark.parametrize(("num_keys", "num_groups"), [(64, 3), (68, 70), (256, 128)])
@pytest.mark.quick("64-3", "68-70")
def test_few_keys_on_a_simulated_gpu(rng, num_keys, num_groups):
    keys = jnp.asarray(rng.integers(-1, num_groups + 1, num_keys), jnp.int32)
    with interpreted():
        check(keys.at[1].set(2**31 - 1).at[2].set(-(2**31)).at[-1].set(0), num_groups, "pallas_gpu")


def test_many_keys_on_a_simulated_gpu(rng, monkeypatch):
    monkeypatch.setattr(kernels, "_FEW_KEYS", 64)
    monkeypatch.setattr(many, "_CHUNK", 128)
    keys = jnp.asarray(rng.integers(-1, 71, 140), jnp.int32)
    with interpreted():
        check(keys, 70, "pallas_gpu")


@pytest.mark.parametrize(("num_keys", "num_groups"), SHAPES)
@pytest.mark.quick("4096-8", "131072-128")
def test_lowers_for_cuda(num_keys, num_groups):
    sort = functools.partial(counting_sort, num_groups=num_groups, backend="pallas_gpu")
    lower_for_cuda(sort, jax.ShapeDtypeStruct((num_keys,), jnp.int32))

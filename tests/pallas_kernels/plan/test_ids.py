import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.plan import as_ids
from tests.helpers import raises_saying

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("in_numpy", [False, True], ids=["jax", "numpy"])
@pytest.mark.parametrize("num_groups", [1, 100, 200, 256, 300, 65536, 70_000, 2**31 - 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.quick(
    "int16-70000-numpy",
    "int32-65536-numpy",
    "int64-2147483647-numpy",
    "int8-256-numpy",
    "uint16-100-jax",
    "uint32-200-jax",
    "uint64-1-jax",
    "uint8-300-numpy",
)
def test_what_is_no_group_is_minus_one(dtype, num_groups, in_numpy):
    info = np.iinfo(dtype)
    numbers = [
        -1,
        0,
        44,
        127,
        128,
        199,
        200,
        255,
        256,
        65535,
        2**31 - 2,
        2**31,
        2**32 - 1,
        2**32 + 3,
        info.min,
        info.max,
    ]
    numbers = [number for number in map(int, numbers) if info.min <= number <= info.max]
    ids = np.array([numbers, numbers], dtype)
    with jax.enable_x64(True):
        out = as_ids(ids, num_groups) if in_numpy else jax.jit(as_ids, static_argnums=1)(jnp.asarray(ids), num_groups)
    assert out.dtype == jnp.int32
    assert out.tolist() == [[number if 0 <= number < num_groups else -1 for number in numbers]] * 2


def test_wide_ids_of_numpy_are_not_cut_short():
    """Where jax has no 64 bits, 2³² + 3 would become 3."""
    assert as_ids(np.array([2**32 + 3, 3, -1]), 8).tolist() == [-1, 3, -1]


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_other_types_are_refused(dtype):
    with raises_saying(ValueError, "ids", "integers", f"{dtype}[2, 3]"):
        as_ids(jnp.zeros((2, 3), dtype), 4)

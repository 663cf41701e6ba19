"""What tests compare with: float64 arrays and errors by norm."""

import contextlib
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

LIMIT = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
"""Largest relative error of a result that is computed in float32 and rounded once to this dtype."""


def float64(x) -> np.ndarray:
    """The values of `x`, of any floating dtype, in float64."""
    return np.asarray(x).astype(np.float64)


def relative_error(out, ref) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; infinite when `out` is not finite, and for any difference from a zero `ref`."""
    out, ref = float64(out), float64(ref)
    assert out.shape == ref.shape
    assert np.isfinite(ref).all()
    if not np.isfinite(out).all():
        return np.inf
    error, size = np.linalg.norm(out - ref), np.linalg.norm(ref)
    if size == 0:
        return 0.0 if error == 0 else np.inf
    return float(error / size)


def normal(rng: np.random.Generator, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Standard normal numbers, rounded to `dtype`."""
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def same_bits(a, b) -> bool:
    """Whether two trees of arrays have equal dtypes, shapes and bits, NaN included."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in _arrays(pairs))


def added_in_refs(function, primals, cotangent, sums):
    """`sums`, a tree like `primals`, after the gradients of `function` went to refs that held them."""
    refs = jax.tree.map(jax.new_ref, sums)
    jax.vjp(function, primals)[1].with_refs(refs)(cotangent)
    return jax.tree.map(jax.freeze, refs)


def additions_to_refs(function, *args) -> int:
    """How often JAX itself adds to a ref."""
    return str(jax.make_jaxpr(function)(*args)).count(" += ")


def _arrays(pairs):
    return ((np.asarray(x), np.asarray(y)) for x, y in pairs)


@contextlib.contextmanager
def raises_saying(error: type[Exception], *parts: str) -> Iterator[None]:
    """Expects `error` with a message that contains every one of `parts`."""
    with pytest.raises(error) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def gradients(function, *args):
    """The gradients of the sum of function(*args) for all of its arguments."""
    return jax.grad(lambda *args: function(*args).astype(jnp.float32).sum(), argnums=tuple(range(len(args))))(*args)


@functools.cache
def mesh_of(axis_type: AxisType = AxisType.Auto, **sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, with axes of these names and sizes."""
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (axis_type,) * len(sizes), devices=devices)

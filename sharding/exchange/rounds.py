"""A sum over a number of rounds that only the data tell, with derivatives.

A `lax.fori_loop` over a traced number of rounds cannot be differentiated in reverse: the number of residuals is
unknown. Here a sum is one primitive, and its derivatives are sums over the same rounds: of the tangents of each round,
and, transposed, of the cotangents of each, which is run forward again for that. So nothing of a round outlives it,
memory is that of one round, and derivatives of every order are there.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir, xla

from pallas_kernels.quantize import takes_gradient
from pallas_kernels.tracing.varying import vary_over, varying_axes

Round = Callable[[jax.Array, Any, Any], jax.Array]

_Arrays = Sequence[jax.Array]


def sum_over_rounds(function: Round, count: jax.Array, constants: Any, args: Any) -> jax.Array:
    """Σ function(r, constants, args) for r = 0 … count − 1, added in that order.

    Args:
      function: one round; closes over nothing that is traced. Its results are of one shape and dtype.
      count: int32 [], traced. Chips that talk to each other in a round must agree on it.
      constants: pytree of arrays that take no gradient.
      args: pytree of arrays; those of 16 bits or more in floating point take a gradient, the others are constants.
    """
    args = jax.tree.map(lambda leaf: leaf if takes_gradient(leaf) else lax.stop_gradient(leaf), args)
    leaves, structure = jax.tree.flatten((lax.stop_gradient(constants), args))
    (total,) = _sums(_Round(function, structure), jnp.asarray(count), leaves)
    return total


@dataclasses.dataclass(frozen=True)
class _Round:
    """`function` of arrays that are not in a tree, with one result."""

    function: Round
    structure: Any

    def __call__(self, index: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        return [self.function(index, *jax.tree.unflatten(self.structure, leaves))]


@dataclasses.dataclass(frozen=True)
class _Tangents:
    """The tangents of a round's results: of its arrays, then the tangents of those that are `moving`."""

    of: Callable[..., list[jax.Array]]
    moving: tuple[int, ...]

    def __call__(self, index: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        values, tangents = arrays[: -len(self.moving)], arrays[-len(self.moving) :]
        moved = [values[i] for i in self.moving]
        return jax.jvp(functools.partial(_with, self.of, index, values, self.moving), moved, list(tangents))[1]


@dataclasses.dataclass(frozen=True)
class _Cotangents:
    """The cotangents, in float32, of the arrays of a round that are `moving`: of its arrays, then of its results."""

    of: Callable[..., list[jax.Array]]
    moving: tuple[int, ...]
    results: int

    def __call__(self, index: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        values, cotangents = arrays[: -self.results], arrays[-self.results :]
        moved = [values[i] for i in self.moving]
        _, pullback = jax.vjp(functools.partial(_with, self.of, index, values, self.moving), *moved)
        return [gradient.astype(jnp.float32) for gradient in pullback(list(cotangents))]


def _with(function: Callable[..., Any], index: jax.Array, values: _Arrays, places: Sequence[int], *moved: jax.Array):
    """function(index, *values), with others at some places."""
    merged = list(values)
    for place, value in zip(places, moved, strict=True):
        merged[place] = value
    return function(index, *merged)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loop(
    function: Callable[..., list[jax.Array]], dtypes: tuple[Any, ...] | None, count: jax.Array, *arrays: jax.Array
) -> list[jax.Array]:
    axes = varying_axes(arrays)
    shapes = jax.eval_shape(function, 0, *arrays)
    dtypes = dtypes or tuple(x.dtype for x in shapes)

    def body(index: jax.Array, so_far: list[jax.Array]) -> list[jax.Array]:
        return [total + vary_over(x, axes) for total, x in zip(so_far, function(index, *arrays), strict=True)]

    def zeros(dtypes: Sequence[Any]) -> list[jax.Array]:
        return [vary_over(jnp.zeros(x.shape, dtype), axes) for x, dtype in zip(shapes, dtypes, strict=True)]

    def some() -> list[jax.Array]:
        totals = lax.fori_loop(0, count, body, zeros([x.dtype for x in shapes]))
        return [total.astype(dtype) for total, dtype in zip(totals, dtypes, strict=True)]

    # Often there is no round: then nothing wider than the results is made, be they as large as all parameters.
    return lax.cond(count > 0, some, lambda: zeros(dtypes))


def _sums(
    function: Callable[..., list[jax.Array]],
    count: jax.Array,
    arrays: _Arrays,
    dtypes: tuple[Any, ...] | None = None,
) -> list[jax.Array]:
    """Σ function(r, *arrays) of each of its results, added in their dtypes and given in `dtypes`, if there are any."""
    traced = _loop.trace(function, dtypes, count, *arrays)
    return _sums_p.bind(count, *arrays, function=function, dtypes=dtypes, jaxpr=traced.jaxpr)


def _jvp(primals, tangents, *, function, dtypes, jaxpr):
    count, *arrays = primals
    results = _sums_p.bind(count, *arrays, function=function, dtypes=dtypes, jaxpr=jaxpr)
    moving = tuple(i for i, tangent in enumerate(tangents[1:]) if not isinstance(tangent, ad.Zero))
    moved = [tangents[1 + i] for i in moving]
    return results, _sums(_Tangents(function, moving), count, [*arrays, *moved], dtypes)


def _transpose(cotangents, count, *arrays, function, dtypes, jaxpr):
    """Only tangents are linear, and so only they are transposed."""
    del dtypes, jaxpr
    assert isinstance(function, _Tangents), function
    values, moved = arrays[: -len(function.moving)], arrays[-len(function.moving) :]
    asked = [i for i, x in enumerate(moved) if ad.is_undefined_primal(x)]
    pull = _Cotangents(function.of, tuple(function.moving[i] for i in asked), len(cotangents))
    wanted = tuple(moved[i].aval.dtype for i in asked)
    found = _sums(pull, count, [*values, *map(ad.instantiate_zeros, cotangents)], wanted)
    result: list[Any] = [None] * (1 + len(arrays))
    for i, total in zip(asked, found, strict=True):
        result[1 + len(values) + i] = total
    return result


def _batch(arrays, dims, *, function, dtypes, jaxpr):
    del jaxpr
    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims, strict=True) if d is not None]

    def one(slices: list[jax.Array]) -> list[jax.Array]:
        rest = iter(slices)
        count, *whole = [x if d is None else next(rest) for x, d in zip(arrays, dims, strict=True)]
        return _sums(function, count, whole, dtypes)

    results = lax.map(one, mapped)
    return results, [0] * len(results)


def _evaluate(*arrays: jax.Array, function: Any, dtypes: Any, jaxpr: Any) -> list[jax.Array]:
    del function, dtypes
    return core.jaxpr_as_fun(jaxpr)(*arrays)


_sums_p = core.Primitive("sum_over_rounds")
_sums_p.multiple_results = True
# jax asks whether what is traced here holds types that have to be lowered first (hijax). Lowering traces it anew,
# and lowers them then.
_sums_p.is_high = lambda *_, **__: False  # type: ignore[method-assign]
_sums_p.def_impl(functools.partial(xla.apply_primitive, _sums_p))
_sums_p.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (jaxpr.out_avals, jaxpr.effects))
mlir.register_lowering(_sums_p, mlir.lower_fun(_evaluate))
ad.primitive_jvps[_sums_p] = _jvp
ad.primitive_transposes[_sums_p] = _transpose
batching.primitive_batchers[_sums_p] = _batch

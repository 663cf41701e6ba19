"""The Pallas kernels in a traced function: which they are, how often they are called, and each as a function.

kernels = find_kernels(jax.jit(layer).trace(*shapes).jaxpr)
jax.jit(kernels[0].function).lower(*kernels[0].arguments(sharding)).compile()
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

_OWN_ARGUMENTS = ("scan", "while", "cond")
"""Primitives whose bodies take other arguments than they do themselves."""

_MOST_ELEMENTS = 1 << 20
"""What is larger is no index, and is not worked out."""


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """One kernel, compiled alike wherever it is called.

    Attributes:
      name: its own.
      calls: how often the function calls it; in a loop whose trips only the data tell, once.
      equation: its equation, in jax's terms.
      grid: the values of grid dimensions that the data give, where they are known.
    """

    name: str
    calls: int
    equation: Any
    grid: tuple[int, ...] | None = None

    @property
    def dynamic_dims(self) -> int:
        """Grid dimensions that the data give."""
        return self.equation.params["grid_mapping"].num_dynamic_grid_bounds

    @property
    def has_dynamic_loops(self) -> bool:
        """Whether the kernel has loops of its own whose trips only the data tell."""
        return any(equation.primitive.name == "while" for equation in _equations(self.equation.params["jaxpr"]))

    @property
    def hbm_bytes(self) -> int | None:
        """What the kernel says that it moves, None if it says nothing."""
        estimate = self.equation.params["cost_estimate"]
        return None if estimate is None else int(estimate.bytes_accessed)

    def function(self, *args: jax.Array) -> Any:
        """The kernel alone. With a known `grid`, that is fixed: the compiler cannot count what only the data tell."""
        params = dict(self.equation.params)
        if self.dynamic_dims and self.grid is not None:
            mapping = params["grid_mapping"]
            values = iter(self.grid)
            sizes = tuple(size if isinstance(size, int) else next(values) for size in mapping.grid)
            params["grid_mapping"] = mapping.replace(grid=sizes)
            args = args[self.dynamic_dims :]
        return self.equation.primitive.bind(*args, **params)

    def arguments(self, sharding: jax.sharding.Sharding) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of its arguments."""
        return [
            jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype, sharding=sharding)
            for variable in self.equation.invars
        ]


def find_kernels(traced: core.Jaxpr, known: Mapping[int, Any] | None = None) -> list[PallasCall]:
    """The kernels of a traced function, in the order of their first calls.

    Args:
      traced: the function.
      known: values of some of its arguments, by position; sizes of grids that follow from them are worked out.
    """
    values = {variable: (known or {}).get(i) for i, variable in enumerate(traced.invars)} | _constants(traced)
    found: dict[str, PallasCall] = {}
    for equation, calls, grid in _walk(traced, values, 1, known is not None):
        operands = [str(variable.aval) for variable in equation.invars]
        identity = f"{equation.params} {operands} {grid}"
        before = found.get(identity)
        name = equation.params["name"] or equation.params["jaxpr"].debug_info.func_name
        found[identity] = PallasCall(name, calls + (before.calls if before else 0), equation, grid)
    return list(found.values())


def _walk(
    jaxpr: core.Jaxpr, values: dict[Any, Any], times: int, works_out: bool
) -> Iterator[tuple[Any, int, tuple[int, ...] | None]]:
    """Every kernel's equation with its calls and grid.

    With `works_out`, what follows from known values is worked out on the way; not so for a function that is laid out
    over the devices of a slice, which are not here.
    """

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values.get(variable)

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        if equation.primitive.name == "pallas_call":
            bounds = inputs[: equation.params["grid_mapping"].num_dynamic_grid_bounds]
            is_known = bool(bounds) and all(bound is not None for bound in bounds)
            yield equation, times, tuple(int(bound) for bound in bounds) if is_known else None
            continue
        is_small = sum(_size(variable) for variable in equation.outvars) <= _MOST_ELEMENTS
        if works_out and is_small and all(value is not None for value in inputs) and not _has_kernel(equation):
            _evaluate(equation, inputs, values)
            continue
        leaves = jax.tree.leaves(dict(equation.params), is_leaf=_is_jaxpr)
        inner = [leaf for leaf in leaves if _is_jaxpr(leaf)]
        binds = equation.primitive.name not in _OWN_ARGUMENTS
        for body in inner:
            binds = binds and len(body.invars) == len(inputs)
            below = dict(zip(body.invars, inputs if binds else [None] * len(body.invars), strict=True))
            below |= _constants(body)
            yield from _walk(body, below, times * equation.params.get("length", 1), works_out)
            if binds and len(inner) == 1:
                for outer, result in zip(equation.outvars, body.outvars, strict=True):
                    values[outer] = result.val if isinstance(result, core.Literal) else below.get(result)


def _size(variable: Any) -> int:
    return variable.aval.size


def _evaluate(equation: Any, inputs: list[Any], values: dict[Any, Any]) -> None:
    with jax.ensure_compile_time_eval():
        results = equation.primitive.bind(*map(np.asarray, inputs), **equation.params)
    values |= dict(zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True))


def _has_kernel(equation: Any) -> bool:
    bodies = [leaf for leaf in jax.tree.leaves(dict(equation.params), is_leaf=_is_jaxpr) if _is_jaxpr(leaf)]
    return any(inner.primitive.name == "pallas_call" for body in bodies for inner in _equations(body))


def _equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(dict(equation.params), is_leaf=_is_jaxpr):
            if _is_jaxpr(leaf):
                yield from _equations(leaf)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr)


def _constants(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    return dict(zip(jaxpr.constvars, jaxpr.consts, strict=True)) if jaxpr.constvars else {}

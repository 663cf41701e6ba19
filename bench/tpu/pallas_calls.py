"""The Pallas kernels in a traced function: which they are, how often they are called, and each as a function.

kernels = find_kernels(jax.jit(layer).trace(*shapes).jaxpr)
function, shapes = kernels[0].alone
jax.jit(function).lower(*shapes).compile()

With `known` arguments, such as the sizes of groups, a kernel becomes its static twin: see `bench.tpu.static_twin`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from bench.tpu.static_twin import contains, dynamic_dims, inner_jaxprs, kernel_jaxpr, reads_scalars, with_scalars
from sharding.exchange import LATER_ROUNDS

_KERNELS = ("pallas_call", "mpmd_map")
"""Primitives that are kernels: of `pl.pallas_call` and, over the cores of a device, of `pl.kernel`."""

_OWN_ARGUMENTS = ("scan", "while", "cond")
"""Primitives whose bodies take other arguments than they do themselves."""

_UNCHANGED = ("with_memory_space_constraint", "copy")
"""Primitives whose result is their argument."""

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
      scalars: the values of its arguments in scalar memory that are known, by position.
    """

    name: str
    calls: int
    equation: Any
    grid: tuple[int, ...] | None = None
    scalars: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_static(self) -> bool:
        """Whether all that its loops and branches may depend on is known."""
        has_grid = self.grid is not None or not dynamic_dims(self.equation)
        return has_grid and self.scalars.keys() >= set(reads_scalars(self.equation))

    @property
    def hbm_bytes(self) -> int | None:
        """What the kernel says that it moves, None if it says nothing."""
        estimate = self.equation.params["cost_estimate"]
        return None if estimate is None else int(estimate.bytes_accessed)

    @property
    def alone(self) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
        """The kernel as a function, with a known `grid` and `scalars` its static twin; and its arguments."""
        return self._call, [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in self.equation.invars]

    def _call(self, *args: jax.Array) -> Any:
        params = with_scalars(self.equation, self.scalars)
        if self.grid is not None:
            mapping = params["grid_mapping"]
            values = iter(self.grid)
            sizes = tuple(size if isinstance(size, int) else next(values) for size in mapping.grid)
            params["grid_mapping"] = mapping.replace(grid=sizes)
            args = args[len(self.grid) :]
        return self.equation.primitive.bind(*args, **params)


def find_kernels(traced: core.Jaxpr, known: Mapping[int, Any] | None = None) -> list[PallasCall]:
    """The kernels of a traced function, in the order of their first calls.

    What follows from the values of those of its arguments that are `known`, by position, is worked out: sizes of grids,
    and scalars that kernels read.
    """
    values = {variable: (known or {}).get(i) for i, variable in enumerate(traced.invars)} | _constants(traced)
    found: dict[str, PallasCall] = {}
    for equation, calls, inputs in _walk(traced, values, 1, known is not None):
        bounds = inputs[: dynamic_dims(equation)]
        grid = tuple(int(bound) for bound in bounds) if bounds and all(x is not None for x in bounds) else None
        scalars = {place: np.asarray(inputs[place]) for place in reads_scalars(equation) if inputs[place] is not None}
        operands = [str(variable.aval) for variable in equation.invars]
        identity = f"{equation.params} {operands} {grid} {scalars}"
        before = found.get(identity)
        name = equation.params["name"] or kernel_jaxpr(equation).debug_info.func_name
        found[identity] = PallasCall(name, calls + (before.calls if before else 0), equation, grid, scalars)
    return list(found.values())


def _walk(
    jaxpr: core.Jaxpr, values: dict[Any, Any], times: int, works_out: bool
) -> Iterator[tuple[Any, int, list[Any]]]:
    """Every kernel's equation with its calls and the values of its arguments, None where they are not known.

    With `works_out`, what follows from known values is worked out on the way; not so for a function that is laid out
    over the devices of a slice, which are not here.
    """

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values.get(variable)

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        if equation.primitive.name in _KERNELS:
            yield equation, times, inputs
            continue
        if equation.primitive.name in _UNCHANGED:
            values |= zip(equation.outvars, inputs, strict=True)
            continue
        inner = inner_jaxprs(dict(equation.params))
        outputs: Sequence[Any] = equation.outvars
        is_index = sum(variable.aval.size for variable in outputs) <= _MOST_ELEMENTS
        is_known = works_out and all(value is not None for value in inputs)
        if is_known and is_index and not any(contains(body, _KERNELS) for body in inner):
            with jax.ensure_compile_time_eval():
                results = equation.primitive.bind(*map(np.asarray, inputs), **equation.params)
            values |= zip(outputs, results if equation.primitive.multiple_results else [results], strict=True)
            continue
        if LATER_ROUNDS in str(equation.source_info.name_stack):
            inner = inner[:1] if "branches" in equation.params else []  # of two branches, that of one round
        binds = equation.primitive.name not in _OWN_ARGUMENTS
        for body in inner:
            binds = binds and len(body.invars) == len(inputs)
            below = dict(zip(body.invars, inputs if binds else [None] * len(body.invars), strict=True))
            below |= _constants(body)
            yield from _walk(body, below, times * equation.params.get("length", 1), works_out)
            if binds and len(inner) == 1:
                for outer, result in zip(outputs, body.outvars, strict=True):
                    values[outer] = result.val if isinstance(result, core.Literal) else below.get(result)


def _constants(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    return dict(zip(jaxpr.constvars, jaxpr.consts, strict=True)) if jaxpr.constvars else {}

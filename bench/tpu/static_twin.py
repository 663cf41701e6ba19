"""Static twins of kernels: the same kernel, which begins by writing into scalar memory what it would be given there.

The compiler finds its estimate by following the kernel's scalar instructions, and takes memory that it knows nothing of
for zero: sizes of groups that are arguments are zero, and the loops over their rows have no trips. Once the kernel has
written the sizes itself, the loops, branches and tables that follow from them are followed as they would run. The
writes are an instruction for each number; nothing else changes.

`without_copies` leaves out the copies between memories too, and the waits for them: what remains is what the kernel's
own instructions take.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

_COPIES = ("dma_start", "dma_wait")


def kernel_jaxpr(equation: Any) -> core.Jaxpr:
    """The kernel of an equation, a function of references."""
    params = equation.params
    return params["jaxpr"] if "jaxpr" in params else params["jaxprs"][0]


def reads_scalars(equation: Any) -> list[int]:
    """The positions of a kernel's arguments that are in scalar memory."""
    skipped = dynamic_dims(equation)
    inputs = kernel_jaxpr(equation).invars[: len(equation.invars) - skipped]
    spaces = [getattr(variable.aval, "memory_space", None) for variable in inputs]
    return [skipped + place for place, space in enumerate(spaces) if space == pltpu.SMEM]


def with_scalars(equation: Any, scalars: Mapping[int, Any]) -> dict[str, Any]:
    """The parameters of a kernel that first writes the values `scalars` of some arguments, by position."""
    params = dict(equation.params)
    if not scalars:
        return params
    kernel, skipped = kernel_jaxpr(equation), dynamic_dims(equation)
    targets = [kernel.invars[place - skipped] for place in scalars]
    rank = len(params["grid_mapping"].grid) if "grid_mapping" in params else 0
    writes = _writes([np.asarray(value) for value in scalars.values()], rank)
    names = dict(zip(writes.invars, targets, strict=False))
    begin = [
        written.replace(invars=[x if isinstance(x, core.Literal) else names.get(x, x) for x in written.invars])
        for written in writes.eqns
    ]
    return _with_kernel(params, kernel.replace(eqns=[*begin, *kernel.eqns]))


def without_copies(equation: Any) -> Any:
    """The equation of a kernel that starts and awaits no copies.

    Raises:
      ValueError: it has none of its own to leave out.
    """
    kernel = kernel_jaxpr(equation)
    if not contains(kernel, _COPIES):
        raise ValueError("its copies are the compiler's own and cannot be left out")
    return equation.replace(params=_with_kernel(dict(equation.params), _without_copies(kernel)))


def contains(jaxpr: core.Jaxpr, primitives: Sequence[str]) -> bool:
    """Whether a function, or one inside it, has an equation of some primitives."""
    return any(
        equation.primitive.name in primitives
        or any(contains(inner, primitives) for inner in inner_jaxprs(dict(equation.params)))
        for equation in jaxpr.eqns
    )


def _with_kernel(params: dict[str, Any], kernel: core.Jaxpr) -> dict[str, Any]:
    """The parameters of an equation with another kernel."""
    return params | ({"jaxpr": kernel} if "jaxpr" in params else {"jaxprs": (kernel, *params["jaxprs"][1:])})


def _without_copies(jaxpr: core.Jaxpr) -> core.Jaxpr:
    def bare(leaf: Any) -> Any:
        return _without_copies(leaf) if is_jaxpr(leaf) else leaf

    kept = [equation for equation in jaxpr.eqns if equation.primitive.name not in _COPIES]
    return jaxpr.replace(eqns=[e.replace(params=jax.tree.map(bare, dict(e.params), is_leaf=is_jaxpr)) for e in kept])


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an equation is a function."""
    return isinstance(value, core.Jaxpr)


def inner_jaxprs(params: Any) -> list[core.Jaxpr]:
    """The functions among parameters of an equation, or inside one of them."""
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_jaxpr) if is_jaxpr(leaf)]


def dynamic_dims(equation: Any) -> int:
    """Grid dimensions that the data give: the first arguments of an equation, which its kernel does not take."""
    mapping = equation.params.get("grid_mapping")
    return 0 if mapping is None else mapping.num_dynamic_grid_bounds


def _writes(values: Sequence[np.ndarray], rank: int) -> core.Jaxpr:
    """A kernel that writes `values` into its arguments in the first step of a grid of `rank` dimensions."""

    def body(*refs):
        def write():
            for ref, value in zip(refs, values, strict=False):
                for place in np.ndindex(value.shape):
                    ref[place] = jnp.asarray(value[place], value.dtype)

        pl.when(sum(pl.program_id(dim) for dim in range(rank)) == 0)(write)

    in_scalar_memory = pl.BlockSpec(memory_space=pltpu.SMEM)
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
    call = pl.pallas_call(body, out_shape=[], grid=(1,) * rank, in_specs=[in_scalar_memory] * len(values), out_specs=[])
    (equation,) = [e for e in jax.make_jaxpr(call)(*shapes).eqns if e.primitive.name == "pallas_call"]
    return kernel_jaxpr(equation)

"""An operator as a JAX primitive: an implementation for each platform, and rules for its derivatives.

JAX traces a program before it knows where it will run. A call of an operator is therefore one equation of the traced
program, and `backend="auto"` picks an implementation only when the equation is lowered, by the platform that it is
lowered for: that of the arrays, of a mesh, or of `jax.export(..., platforms=["tpu"])`. Until then the reference is
traced, which tells the shapes and dtypes of the result. Where the caller names a backend or a target, that
implementation is traced at once, so that what it refuses is an error at the call.

Derivatives are operators too. A `jvp` rule takes operands and tangents by name and returns the result and its tangent,
the latter by operators that are linear in the tangent; these have a second rule, for their transposes. Reverse mode
thus keeps the operands of those operators and nothing else, and derivatives of every order exist.

    tripled = Operator("triple", "triple", jvp=..., transpose=...)    # pallas_kernels/triple/reference.py: triple(x, n)
    tripled("auto", x=x, n=3)

Called with arrays outside of `jax.jit`, an operator is compiled once for shapes and settings that are alike.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir, xla
from jax.interpreters import partial_eval as pe

from pallas_kernels.backend import PREFERRED, check_backend, run
from pallas_kernels.on_tpu.device import as_on_a_tpu
from pallas_kernels.tracing.gradient_refs import define_transpose
from pallas_kernels.tracing.override import Overrides, overrides
from pallas_kernels.tracing.target import lowering_for, named_platform
from pallas_kernels.tracing.unless_differentiated import jvp_of_moving
from pallas_kernels.tracing.varying import vary_alike

Operands = dict[str, Any]
"""What an operator is called with, by name: pytrees of arrays, and what is fixed at trace time."""

_PLATFORMS: Mapping[str, str] = {"tpu": "tpu", "cuda": "gpu"}
"""The platforms, as JAX names them when it lowers, that have kernels, and as `target_platform` names them."""


class _Array:
    """Stands for an array among what is fixed at trace time."""

    def __repr__(self) -> str:
        return "array"


_ARRAY = _Array()


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed at trace time of one call of an operator.

    Attributes:
      backend: as the caller names it.
      structure: of the operands.
      leaves: of the operands, `_ARRAY` for each array.
      overrides: with which it was called.
      is_settled: whether the implementation is the same on all platforms.
    """

    backend: str
    structure: Any
    leaves: tuple[Any, ...]
    overrides: Overrides
    is_settled: bool

    def operands(self, arrays: Sequence[Any]) -> Operands:
        """The operands, with `arrays` (or what stands for them) in their places."""
        rest = iter(arrays)
        return jax.tree.unflatten(self.structure, [next(rest) if x is _ARRAY else x for x in self.leaves])


class Operator:
    """One function of an operator's implementations, to be called with a backend and operands by name.

    Args:
      operator: the package below `pallas_kernels`, or a function (backend, **operands) that is made of operators.
      function: its function, of that name in each of its implementations; of one that is made of operators its name.
      linear_in: names of array operands in each of which the operator is linear while the others are fixed; its
        tangents follow from that.
      jvp: (backend, operands, tangents) -> (result, its tangent), where `linear_in` is not given. Tangents have the
        structure of the operands, or are `ad.Zero`. The default for what is made of operators follows from them.
      transpose: (backend, cotangent, operands) -> the cotangents of those operands that are asked for, by name, within
        dictionaries and lists as the operands are; see `tracing.gradient_refs.accumulate` for those that go to refs. Of
        several results it gets a tuple of cotangents, some of which may be `ad.Zero`.
      hidden: names of operands that only the rules see.
      fewer: (operands, which leaves of the result are used) -> operands with which no more is computed than is needed,
        and which leaves there are still. JAX asks where it removes what nobody uses.
    """

    def __init__(
        self,
        operator: str | Callable[..., Any],
        function: str,
        *,
        linear_in: tuple[str, ...] = (),
        jvp: Callable[[str, Operands, Operands], tuple[Any, Any]] | None = None,
        transpose: Callable[[str, Any, Operands], Operands] | None = None,
        hidden: frozenset[str] = frozenset(),
        fewer: Callable[[Operands, list[bool]], tuple[Operands, list[bool]]] | None = None,
    ):
        self._operator, self._function, self._hidden = operator, function, hidden
        self._traced = jax.jit(self._run, static_argnums=0)
        self._primitive = core.Primitive(function)
        self._primitive.multiple_results = True
        # jax asks whether what is traced here holds types that have to be lowered first (hijax). Lowering traces it
        # anew, and lowers them then.
        self._primitive.is_high = lambda *_, **__: False  # type: ignore[method-assign]
        self._primitive.def_impl(functools.partial(xla.apply_primitive, self._primitive))
        self._primitive.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (jaxpr.out_avals, jaxpr.effects))
        batching.primitive_batchers[self._primitive] = self._batch
        mlir.register_lowering(self._primitive, _lower_traced)
        for name, platform in _PLATFORMS.items():
            mlir.register_lowering(self._primitive, functools.partial(self._lower, platform), platform=name)
        if linear_in:
            jvp = functools.partial(self._linear_jvp, linear_in)
        elif jvp is None and callable(operator):
            jvp = functools.partial(jvp_of_composed, operator)
        if jvp is not None:
            ad.primitive_jvps[self._primitive] = functools.partial(self._jvp, jvp)
        if transpose is not None:
            define_transpose(self._primitive, functools.partial(self._transpose, transpose))
        if fewer is not None:
            pe.dce_rules[self._primitive] = functools.partial(_without_unused, fewer)

    def __call__(self, backend: str, **operands: Any) -> Any:
        """Calls the operator.

        Raises:
          ValueError: `backend` is not a name of a backend.
          Unsupported: the named backend, or a target's, cannot do what it was asked.
        """
        check_backend(backend)
        leaves, structure = jax.tree.flatten(operands)
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        fixed = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
        is_settled = callable(self._operator) or backend != "auto" or named_platform() is not None
        call = Call(backend, structure, fixed, overrides(), is_settled)
        return self._bind(call, [leaf for leaf, array in zip(leaves, is_array, strict=True) if array])

    def _bind(self, call: Call, arrays: Sequence[jax.Array]) -> Any:
        arrays = vary_alike(list(arrays))
        traced = self._traced.trace(call, *arrays)
        results = self._primitive.bind(*arrays, call=call, jaxpr=traced.jaxpr)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)

    def _run(self, call: Call, *arrays: jax.Array) -> Any:
        """The implementation, where the call is settled, else the reference."""
        return self._implementation(call if call.is_settled else dataclasses.replace(call, backend="xla"), arrays)

    def _implementation(self, call: Call, arrays: Sequence[jax.Array]) -> Any:
        operands = {name: x for name, x in call.operands(arrays).items() if name not in self._hidden}
        if callable(self._operator):
            return self._operator(call.backend, **operands)
        return run(self._operator, self._function, call.backend, **operands)

    def _lower(self, platform: str, ctx: Any, *values: Any, call: Call, jaxpr: Any) -> Any:
        """The lowering rule of a platform that has kernels."""
        if call.is_settled:
            return _lower_traced(ctx, *values, call=call, jaxpr=jaxpr, platform=platform)

        def implementation(*arrays: jax.Array) -> list[jax.Array]:
            with call.overrides.again(), lowering_for(platform):
                return jax.tree.leaves(self._implementation(call, arrays))

        with as_on_a_tpu() if platform == "tpu" else contextlib.nullcontext():
            return mlir.lower_fun(implementation)(
                ctx.replace(avals_in=[_on_this_mesh(x) for x in ctx.avals_in]), *values
            )

    def _jvp(self, rule, primals, tangents, *, call: Call, jaxpr: Any):
        del jaxpr
        with call.overrides.again():
            out, tangent = rule(call.backend, call.operands(primals), call.operands(tangents))
        results = jax.tree.leaves(out)
        structure: Any = jax.tree.structure(out)
        return results, [_instantiated(t, x) for t, x in zip(structure.flatten_up_to(tangent), results, strict=True)]

    def _linear_jvp(self, names: Sequence[str], backend: str, operands: Operands, tangents: Operands):
        terms = [self(backend, **operands | {n: tangents[n]}) for n in names if not is_zero(tangents[n])]
        result = self(backend, **operands)
        return result, sum(terms[1:], start=terms[0]) if terms else zero_tangent(result)

    def _transpose(self, rule, cotangents, *arrays, call: Call, jaxpr: Any):
        del jaxpr
        operands = call.operands(arrays)
        if all(isinstance(cotangent, ad.Zero) for cotangent in cotangents):
            return [ad.Zero(x.aval) if is_asked_for(x) else None for x in arrays]
        with call.overrides.again():
            found = rule(call.backend, cotangents[0] if len(cotangents) == 1 else tuple(cotangents), operands)
        result = [None] * len(arrays)
        _put(found, call.operands(range(len(arrays))), result)
        return result

    def _batch(self, arrays, dims, *, call: Call, jaxpr: Any):
        """One after the other: kernels fill a chip, and the loops of references are as long as the longest of them."""
        del jaxpr
        mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims, strict=True) if d is not None]

        def one(slices: list[jax.Array]) -> list[jax.Array]:
            rest = iter(slices)
            whole = [x if d is None else next(rest) for x, d in zip(arrays, dims, strict=True)]
            with call.overrides.again():
                return jax.tree.leaves(self._bind(call, whole))

        results = jax.lax.map(one, mapped)
        return results, [0] * len(results)


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero, or is of what has none."""
    return tangent is None or isinstance(tangent, ad.Zero)


def is_asked_for(operand: Any) -> bool:
    """Whether the rule of a transpose is asked for the cotangent of `operand`."""
    return isinstance(operand, ad.UndefinedPrimal)  # one asked for in a ref too, which `ad.is_undefined_primal` is not


def zero_tangent(of: jax.Array) -> ad.Zero:
    """The tangent of `of` that is zero."""
    return ad.Zero(jax.typeof(of).to_tangent_aval())


def jvp_of_composed(
    function: Callable[..., Any], backend: str, operands: Operands, tangents: Operands
) -> tuple[Any, Any]:
    """function(backend, **operands), which is made of operators, and its tangent."""
    return jvp_of_moving(lambda operands: function(backend, **operands), (operands,), (tangents,))


def _put(found: Any, places: Any, result: list[Any]) -> None:
    """Puts what was found of operands where `places` says, in dictionaries and lists that lack what was not."""
    if isinstance(places, int):
        result[places] = found
        return
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        _put(value, places[key], result)


def _instantiated(tangent: Any, result: jax.Array) -> Any:
    return zero_tangent(result) if is_zero(tangent) else tangent


def _without_unused(rule: Any, used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Whether each operand of a call is needed, and the call without what is not used of its result."""
    equation = rest[-1]  # jax 0.12 says before it which operands are live
    every = [True] * len(equation.invars)
    if equation.effects or all(used):
        return every, equation
    if not any(used):
        return [not needed for needed in every], None
    call, jaxpr = equation.params["call"], equation.params["jaxpr"]
    operands, kept = rule(call.operands([_ARRAY] * len(equation.invars)), list(used))
    # Not settled, so that what was traced of an implementation, which is less now, is traced anew where it has kernels.
    leaves, structure = jax.tree.flatten(operands)
    smaller = dataclasses.replace(call, structure=structure, leaves=tuple(leaves), is_settled=False)
    params = {"call": smaller, "jaxpr": pe.dce_jaxpr(jaxpr, kept, instantiate=True)[0]}
    results = [x for x, is_kept in zip(equation.outvars, kept, strict=True) if is_kept]
    return every, equation.replace(params=params, outvars=results)


def _evaluate(*arrays: jax.Array, call: Call, jaxpr: Any) -> list[jax.Array]:
    """What was traced."""
    del call
    return core.jaxpr_as_fun(jaxpr)(*arrays)


def _lower_traced(ctx: Any, *values: Any, call: Call, jaxpr: Any, platform: str = "") -> Any:
    """Lowers what was traced; `platform` is that of the rule, if it is one that has kernels.

    Raises:
      ValueError: it has kernels of a named backend, which is another platform's.
    """
    try:
        return mlir.lower_fun(_evaluate)(ctx, *values, call=call, jaxpr=jaxpr)
    except Exception as error:
        if call.backend not in PREFERRED.values() or PREFERRED.get(platform) == call.backend:
            raise
        found = ", ".join(ctx.module_context.platforms)
        raise ValueError(
            f"backend {call.backend!r} has no kernels for a platform that this program is for ({found}): take 'auto', "
            "which finds those of each platform, or 'xla'"
        ) from error


def _on_this_mesh(aval: Any) -> Any:
    """The type of an array, its mesh, if it has one, the one that is lowered for."""
    mesh = jax.sharding.get_abstract_mesh()
    if aval.sharding.mesh.empty or aval.sharding.mesh == mesh:
        return aval
    return aval.update(sharding=aval.sharding.update(mesh=mesh))

"""Cotangents that are added to a ref as they are written: what `pullback.with_refs(refs)(dy)` of `jax.vjp` asks for.

JAX adds the cotangent of an operand to the ref that is given for it, which reads and writes the sum and the cotangent
once more. A rule for a transpose that sees the ref can have a kernel add to it instead. JAX has no public name for the
table of such rules. Where there is none, cotangents are returned as usual, and JAX adds them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.hijax import GradAccum, RefAccum
from jax.interpreters import ad

_RULES: dict[Any, Callable[..., None]] = getattr(inspect.getmodule(RefAccum), "fancy_transposes", {})


class AskedInRef(ad.UndefinedPrimal):
    """An operand whose cotangent is to be added to `ref`, of the same dtype. A leaf of pytrees."""

    __slots__ = ("ref",)

    def __init__(self, aval: Any, ref: Any):
        super().__init__(aval)
        self.ref = ref


def accumulate(operand: Any, cotangent: Callable[[jax.Array | None], jax.Array]) -> jax.Array | None:
    """The cotangent of an operand that is asked for: `cotangent(None)`.

    Where it goes to a ref, that takes `cotangent(value)`, which is to add it to the value of the ref, in the shape of
    the operand; there is nothing left to add then, None.
    """
    if not isinstance(operand, AskedInRef):
        return cotangent(None)
    operand.ref[...] = cotangent(operand.ref[...])
    return None


def define_transpose(primitive: Any, transpose: Callable[..., Any]) -> None:
    """Has `transpose`, a rule as of `ad.primitive_transposes`, see which operands are asked for in refs."""

    def rule(cotangents: Any, *operands: Any, **params: Any) -> None:
        places = [_asked(x) if isinstance(x, GradAccum) else x for x in operands]
        for operand, found in zip(operands, transpose(cotangents, *places, **params), strict=True):
            if isinstance(operand, GradAccum):
                operand.accum(found)

    ad.primitive_transposes[primitive] = transpose
    _RULES[primitive] = rule


def _asked(operand: GradAccum) -> ad.UndefinedPrimal:
    aval: Any = operand.aval
    ref = operand.ref if type(operand) is RefAccum else None
    # A ref that JAX makes has the dtype of the cotangent that came first, which may be another.
    return ad.UndefinedPrimal(aval) if ref is None or ref.dtype != aval.dtype else AskedInRef(aval, ref)

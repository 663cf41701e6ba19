"""One function where no gradient is asked for, another one where one is."""

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def unless_differentiated(fast: Callable[..., Any], differentiable: Callable[..., Any], *args: Any) -> Any:
    """fast(*args), or differentiable(*args) inside `jax.grad` and its kin: for what serving can do and training cannot.

    Args:
      fast: need have no gradient. Closes over nothing that is traced, as `differentiable`.
      differentiable: gives the same to rounding.
      *args: pytrees of arrays.
    """
    del differentiable
    return fast(*args)


def _forward(fast, differentiable, *args):
    del fast
    return jax.vjp(differentiable, *args)


def _backward(fast, differentiable, pull, cotangents):
    del fast, differentiable
    return pull(cotangents)


unless_differentiated.defvjp(_forward, _backward)

"""Checks of settings, whose errors give the name, what was expected, and what came."""

import contextlib
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import require_arrays
from pallas_kernels.dtypes import FLOATS, is_float


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError unless `condition`."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


def check_config(config: object) -> None:
    """Raises TypeError unless `config` is a MoEConfig, told by its fields: that class imports this module."""
    if not all(hasattr(config, name) for name in ("num_experts", "top_k", "router")):
        is_name = isinstance(config, str)
        hint = "get_preset('mixtral-8x7b') makes one of a name" if is_name else "of a layer, layer.config"
        raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}; {hint}")


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError unless `dtype`, in any form that jax knows, is one of `FLOATS`."""
    if dtype is not None:  # which numpy takes for float64
        with contextlib.suppress(TypeError):
            dtype = jnp.dtype(dtype).name
    require(dtype in FLOATS, name, "bfloat16, float16 or float32", dtype)


def check_residual(residual: jax.Array | None, x: jax.Array) -> None:
    """Raises TypeError or ValueError unless `residual`, if given, can be added to what a layer makes of x [..., H]."""
    require_arrays(residual=residual)
    if residual is None:
        return
    is_alike = residual.shape == x.shape and is_float(residual.dtype)
    if not is_alike:
        raise ValueError(
            f"residual must be BF16, FP16 or float32 {list(x.shape)}, of the shape of x, got "
            f"{residual.dtype}{list(residual.shape)}"
        )


def require_integer(name: str, value: object, at_least: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `at_least`."""
    try:
        is_fit = not isinstance(value, bool) and operator.index(value) >= at_least  # type: ignore[arg-type]
    except TypeError:
        is_fit = False
    require(is_fit, name, f"a whole number of at least {at_least}", value)


def require_number(name: str, value: object, *, at_least: float = -math.inf, positive: bool = False) -> None:
    """Raises ValueError unless `value` is finite, and as large as asked for."""
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    is_fit = math.isfinite(number) and number >= at_least
    expected = "positive and finite" if positive else "finite" if at_least == -math.inf else f"at least {at_least:g}"
    require(is_fit and (not positive or number > 0), name, expected, value)

"""Which implementation of an operator runs.

An operator is a folder; each of its implementations is a module in it, found by name when it is first asked for:

    "xla"         reference.py   plain XLA, runs anywhere, defines the answer
    "pallas_tpu"  tpu.py, tpu/   Pallas kernels for TPU
    "pallas_gpu"  gpu.py, gpu/   Pallas kernels for NVIDIA GPUs

"auto" takes the kernels of the platform that the program is lowered for (see `primitive`), or of the chip that
`target.targeting` names. Where these raise `Unsupported` it falls through to "xla", with one warning. A backend that
the caller names never falls through: what its kernels cannot do is an error. Only an operator that has no kernels at
all for the named platform (top-k and plan on a TPU) uses XLA there, so that one name serves a whole layer.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from pallas_kernels.tracing.concrete import is_symbolic
from pallas_kernels.tracing.target import target_platform
from pallas_kernels.tracing.varying import vary_over, varying_axes

MODULES: Mapping[str, str] = MappingProxyType({"xla": "reference", "pallas_tpu": "tpu", "pallas_gpu": "gpu"})
PREFERRED: Mapping[str, str] = MappingProxyType({"tpu": "pallas_tpu", "gpu": "pallas_gpu"})
"""The backend that "auto" takes on each platform that has kernels."""


class Unsupported(NotImplementedError):
    """A backend cannot do what it was asked: this dtype, this chip, this shape. The message names what it can do."""


@functools.cache
def available(operator: str) -> tuple[str, ...]:
    """The backends that `operator` (a package below `pallas_kernels`) has, in the order of `MODULES`."""
    return tuple(name for name, module in MODULES.items() if importlib.util.find_spec(_path(operator, module)))


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is "auto" or a key of `MODULES`."""
    if backend != "auto" and backend not in MODULES:
        raise ValueError(f"unknown backend {backend!r}; expected one of 'auto', {', '.join(map(repr, MODULES))}")


def run(operator: str, function: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Calls `function` of the implementation of `operator` that `backend` picks.

    Raises:
      ValueError: `backend` is not a name of a backend.
      Unsupported: the named backend cannot do what it was asked.
    """
    check_backend(backend)
    if backend != "auto":
        return _call(operator, function, backend if backend in available(operator) else "xla", args, kwargs)
    preferred = PREFERRED.get(target_platform())
    if preferred in available(operator):
        try:
            return _call(operator, function, preferred, args, kwargs)
        except Unsupported as reason:
            _say_once(operator, str(reason))
    return _call(operator, function, "xla", args, kwargs)


def _call(operator: str, function: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls it. Inside `jax.shard_map`, what a kernel returns varies over the mesh axes that its operands vary over."""
    module = importlib.import_module(_path(operator, MODULES[backend]))
    operands = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, jax.Array)]
    if backend != "xla" and not getattr(module, "TAKES_SYMBOLS", False):
        _require_numbers(operator, operands)
    result = getattr(module, function)(*args, **kwargs)
    return vary_over(result, varying_axes(operands))


def _require_numbers(operator: str, operands: list[jax.Array]) -> None:
    """Raises Unsupported for sizes that are symbols, as `jax.export` can have them: kernels are cut for a size."""
    for operand in operands:
        if is_symbolic(*operand.shape):
            shape = f"[{', '.join(map(str, operand.shape))}]"
            raise Unsupported(f"{operator}: kernels need sizes that are numbers, got an operand {shape}")


def _path(operator: str, module: str) -> str:
    return f"{__package__}.{operator}.{module}"


@functools.cache
def _say_once(operator: str, reason: str) -> None:
    warnings.warn(f"{operator}: falling back to the XLA reference: {reason}", stacklevel=4)

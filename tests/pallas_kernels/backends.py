"""Running one suite over every backend of an operator.

A suite says `backend = every_backend("dispatch")`, passes `backend` to the function under test, and so covers each
implementation that the operator has, present and future. Kernels for TPU run in interpret mode where there is no TPU;
kernels for GPU need one. What a kernel refuses with `Unsupported` counts as skipped, with its reason (conftest.py).
"""

import contextlib

import jax
import pytest

from pallas_kernels.backend import available
from tests.pallas_kernels.kernels_tpu import interpreted


def every_backend(operator: str, *, without: tuple[str, ...] = ()):
    """A fixture that runs a test once for each backend of `operator`, those `without` excepted."""
    marks = {"pallas_gpu": pytest.mark.gpu}
    names = [name for name in available(operator) if name not in without]
    params = [pytest.param(name, marks=marks.get(name, ())) for name in names]

    @pytest.fixture(params=params)
    def backend(request):
        with _interpreted(request.param):
            yield request.param

    return backend


def _interpreted(backend: str):
    if backend == "pallas_tpu" and jax.default_backend() != "tpu":
        return interpreted()
    return contextlib.nullcontext()

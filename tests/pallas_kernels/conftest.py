import pytest

from pallas_kernels.backend import Unsupported


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except Unsupported as reason:
        backend = pyfuncitem.funcargs.get("backend", "xla")
        if backend == "xla":
            raise
        pytest.skip(f"{backend}: {reason}")

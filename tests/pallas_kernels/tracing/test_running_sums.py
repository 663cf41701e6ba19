"""Running sums, as each platform adds them up."""

import jax
import numpy as np
import pytest
from jax import lax

from pallas_kernels.tracing.running_sums import running_sums


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("dtype", ["int32", "uint32"])
@pytest.mark.parametrize(("shape", "axis"), [((7,), 0), ((5, 7), 0), ((5, 7), 1), ((1, 3), 0)], ids=str)
def test_sums(shape, axis, dtype, platform, rng, monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda x, **branches: branches[platform](x))
    x = rng.integers(0, 2, shape).astype(bool)
    sums = running_sums(jax.numpy.asarray(x), axis=axis, dtype=dtype)
    assert sums.dtype == dtype
    np.testing.assert_array_equal(sums, np.cumsum(x, axis))

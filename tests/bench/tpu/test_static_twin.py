"""Static twins compute the same, and no longer read what they are given in scalar memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench.tpu.pallas_calls import find_kernels
from bench.tpu.static_twin import reads_scalars

SIZES = np.array([2, 0, 3], np.int32)


def repeat(sizes, x):
    """x times the sum of sizes in a loop of as many trips, with a grid of two steps."""

    def body(sizes_ref, x_ref, out_ref):
        out_ref[...] = jnp.zeros_like(out_ref)

        def add(group):
            @pl.loop(0, sizes_ref[group])
            def _(_):
                out_ref[...] += x_ref[...]

        pl.loop(0, len(SIZES))(add)

    block = pl.BlockSpec((8, 128), lambda i, sizes_ref: (i, 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2,), in_specs=[block], out_specs=block)
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid_spec=grid, name="repeat")(
        sizes, x
    )


def found(**known):
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    (kernel,) = find_kernels(jax.jit(repeat).trace(SIZES, x).jaxpr, **known)
    return kernel


def test_kernels_are_static_once_their_scalars_are_known():
    assert reads_scalars(found().equation) == [0]
    assert not found().is_static
    assert found(known={0: SIZES}).is_static


@pytest.mark.parametrize("given", [SIZES, np.zeros_like(SIZES)])
def test_a_twin_computes_the_same_whatever_it_is_given(given):
    x = jax.random.normal(jax.random.key(0), (16, 128))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        (out,) = jax.jit(found(known={0: SIZES}).alone[0])(given, x)
    np.testing.assert_allclose(out, SIZES.sum() * x, rtol=1e-6)

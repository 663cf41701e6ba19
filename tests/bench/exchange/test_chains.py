"""A chain makes all its calls, one after the other, and gives the result of one."""

import jax
import jax.numpy as jnp
import numpy as np

from bench.exchange.chains import chained, never
from bench.measure.every_chip import on_every_chip, over_chips
from sharding.mesh import make_mesh

CHIPS, LENGTH = 2, 5


def test_every_call_is_made_and_the_operands_stay_as_they_are():
    mesh = make_mesh(CHIPS, devices=jax.devices("cpu")[:CHIPS])
    seen = []

    def note(x, ids):
        seen.append((x.astype(np.float32).tolist(), ids.tolist()))
        return x

    def step(moving, fixed):
        x, ids = moving
        y = jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x, ids, vmap_method="sequential")
        return y * fixed, jnp.full((3,), jnp.nan)  # what nobody looks at may be NaN

    x = over_chips(np.arange(CHIPS * 4).astype(jnp.bfloat16), mesh)
    ids = over_chips(np.arange(CHIPS * 2, dtype=np.int32) - 1, mesh)
    fixed = over_chips(np.full(CHIPS * 4, 2).astype(jnp.bfloat16), mesh)
    y, _ = on_every_chip(chained(step, LENGTH), mesh)(never(mesh), (x, ids), fixed)
    np.testing.assert_array_equal(np.asarray(y, np.float32), 2 * np.arange(8).reshape(2, 4))
    assert sorted(seen) == sorted([([0, 1, 2, 3], [-1, 0])] * LENGTH + [([4, 5, 6, 7], [1, 2])] * LENGTH)


def test_operands_depend_on_the_result_before():
    """With a limit that is exceeded each call gets another first element: nothing of it can be done beforehand."""
    mesh = make_mesh(CHIPS, devices=jax.devices("cpu")[:CHIPS])
    x = over_chips(np.ones(CHIPS * 3, np.float32), mesh)
    chain = on_every_chip(chained(lambda moving, fixed: moving, LENGTH), mesh)
    y = chain(-never(mesh), x, None)
    np.testing.assert_array_equal(y, [[1.0 + LENGTH, 1, 1]] * CHIPS)

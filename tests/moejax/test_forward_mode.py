"""Derivatives in forward mode of the whole layer, against its gradients, on one chip and over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import moe
from sharding.mesh import make_mesh
from tests.helpers import normal
from tests.moejax.layers import narrow, random_params


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("precision", ["w16a16", "w8a8"])
@pytest.mark.slow
def test_forward_mode_agrees_with_reverse(precision, ep, rng):
    config = narrow("qwen3-30b-a3b", num_experts=8, top_k=2, dtype="float32", precision=precision)
    params, x = random_params(config, rng), normal(rng, 12, config.hidden_size)
    mesh = make_mesh(ep) if ep > 1 else None
    direction = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), (x, params))

    def loss(x, params):
        return jnp.sin(moe(x, params, config, mesh=mesh)[0]).sum()

    _, forward = jax.jit(lambda *operands: jax.jvp(loss, operands, direction))(x, params)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
    reverse = sum(np.vdot(np.asarray(g, np.float64), np.asarray(d, np.float64)) for g, d in pairs)
    assert abs(float(forward) - reverse) < 1e-4 * abs(reverse) + 1e-3

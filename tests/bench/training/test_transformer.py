"""The model of the quality bench."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.training.transformer import Transformer, rotate
from moejax import MoEConfig
from moejax.routers import ROUTERS
from tests.helpers import normal, raises_saying

CONFIG = MoEConfig(16, 8, 4, 2, dtype=jnp.float32)


def make(router: str) -> Transformer:
    return Transformer(ROUTERS[router](CONFIG), 1, 2, rngs=nnx.Rngs(0))


def test_rotated_products_depend_on_the_distance_only(rng):
    q, k = (jnp.broadcast_to(normal(rng, 8), (1, 12, 1, 8)) for _ in range(2))
    products = np.asarray(rotate(q)[0, :, 0] @ rotate(k)[0, :, 0].T)
    for distance in (-3, 0, 5):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products[0]) > 1e-2
    np.testing.assert_allclose(np.diagonal(products), (q[0, 0, 0] * k[0, 0, 0]).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("router", "is_causal"), [("softmax", True), ("soft_moe", False)])
@pytest.mark.quick("soft_moe-False")
def test_later_bytes_matter_only_where_the_router_says_so(rng, router, is_causal):
    model = make(router)
    assert model.causal is is_causal
    ids = jnp.asarray(rng.integers(256, size=(1, 12)))
    changed = ids.at[0, -1].add(1)
    before, after = (np.asarray(model(each)[0][0, :-1]) for each in (ids, changed % 256))
    assert np.allclose(before, after, atol=1e-6) is is_causal


def test_heads_that_do_not_divide_are_refused():
    with raises_saying(ValueError, "multiple of 2 · num_heads", "hidden_size=16, num_heads=3"):
        Transformer(CONFIG, 1, 3, rngs=nnx.Rngs(0))

"""The model of the quality bench."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.training.transformer import Transformer
from moejax import MoEConfig
from moejax.routers import ROUTERS
from tests.helpers import raises_saying

CONFIG = MoEConfig(16, 8, 4, 2, dtype=jnp.float32)


def make(router: str) -> Transformer:
    return Transformer(ROUTERS[router](CONFIG), 1, 2, rngs=nnx.Rngs(0))


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

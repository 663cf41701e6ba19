import jax

from bench.inputs.weights import make_params
from moejax import MoEConfig
from sharding.mesh import make_mesh
from tests.helpers import same_bits


def test_weights_are_the_same_on_every_mesh():
    config = MoEConfig(128, 128, 4, 2, precision="w8a8")
    one, four = (make_params(config, make_mesh(ep, devices=jax.devices("cpu")[:ep]), 0) for ep in (1, 4))
    assert same_bits(jax.device_get(one), jax.device_get(four))

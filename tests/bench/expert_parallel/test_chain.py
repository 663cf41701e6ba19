import jax

from bench.expert_parallel.chain import _SHARE, chain_of_layers
from bench.inputs.weights import make_params
from moejax import MoEConfig, moe
from sharding.mesh import make_mesh
from tests.helpers import relative_error


def test_a_chain_calls_the_layer_on_what_the_last_left():
    config, mesh = MoEConfig(128, 64, 4, 2, dtype="float32"), make_mesh(1, devices=jax.devices("cpu")[:1])
    params, x = make_params(config, mesh, 0), jax.random.normal(jax.random.key(0), (8, 128))
    expected = x
    for _ in range(3):
        expected = expected + _SHARE * moe(expected, params, config, mesh=mesh)[0]
    assert relative_error(chain_of_layers(config, mesh, 3)(x, params) - x, expected - x) < 1e-4

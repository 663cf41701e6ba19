"""Initial values: each chip makes its own share, and they are the same on every mesh."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from moejax import MoE, MoEConfig, Partition, linen, make_mesh
from tests.helpers import relative_error

CONFIG = MoEConfig(32, 16, 8, 2, 16, expert_bias=True)
MAKERS = {
    "nnx": """
        def make(config):
            return MoE(config, rngs=nnx.Rngs(0))
    """,
    "linen": """
        def make(config):
            return linen.MoE(config).init(jax.random.key(0), jax.numpy.ones((1, 8, config.hidden_size)))
    """,
}
PROGRAM = """
    import resource
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from flax import nnx
    from moejax import MoE, MoEConfig, linen, make_mesh

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    with jax.set_mesh(make_mesh(ep=8)):
        jax.block_until_ready(jax.tree.leaves(make(MoEConfig(64, 64, 32, 2))))
        before = peak()
        made = make(MoEConfig(1024, 1024, 32, 2))
        jax.block_until_ready(jax.tree.leaves(made))
        print(peak() - before)
"""


@pytest.mark.parametrize("how", MAKERS)
@pytest.mark.slow
def test_a_layer_made_eagerly_lies_in_memory_once(how):
    size = 3 * 1024 * 1024 * 32 * 4
    program = textwrap.dedent(PROGRAM).replace("def peak", textwrap.dedent(MAKERS[how]) + "\ndef peak")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout.split()[-1]) < 1.5 * size


MESHES = {
    "expert": ({"expert": 4}, None),
    "fsdp and tensor": ({"fsdp": 2, "expert": 2, "tensor": 2}, None),
    "all on fsdp": ({"fsdp": 8}, Partition(expert=None)),
}


@pytest.mark.parametrize(
    ("axis_type", "jitted"), [(AxisType.Auto, False), (AxisType.Auto, True), (AxisType.Explicit, False)]
)
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.quick("all on fsdp-AxisType.Auto-True")
def test_values_are_the_same_on_every_mesh(name, axis_type, jitted):
    sizes, partition = MESHES[name]
    expected = MoE(CONFIG, rngs=nnx.Rngs(3)).params()
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (axis_type,) * len(sizes), devices=devices)

    def make():
        return MoE(CONFIG, rngs=nnx.Rngs(3), partition=partition)

    with jax.set_mesh(mesh):
        layer = nnx.jit(make)() if jitted else make()
    for got, value in zip(jax.tree.leaves(layer.params()), jax.tree.leaves(expected), strict=True):
        assert got.dtype == value.dtype
        assert relative_error(got, value) < 1e-6
    shape = layer.gate_up[...].addressable_shards[0].data.shape
    assert np.prod(shape) * len(devices) == expected.gate_up.size


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_same_as_linen(rng):
    x = jnp.ones((1, 8, 32))
    alone = linen.MoE(CONFIG).init(jax.random.key(0), x)
    with jax.set_mesh(make_mesh(ep=8)):
        spread = linen.MoE(CONFIG).init(jax.random.key(0), x)
    for got, value in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        assert relative_error(got, value) < 1e-6

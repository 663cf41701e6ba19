import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.tracing.varying import result_varying_as, vary_alike, vary_over, varying_axes
from sharding.mesh import EXPERT_AXIS, make_mesh

SPLIT, WHOLE = PartitionSpec(EXPERT_AXIS), PartitionSpec()


@pytest.fixture
def mesh():
    return make_mesh(4)


def test_nothing_happens_outside_of_shard_map():
    x = jnp.ones(3)
    assert varying_axes((x, {"y": x})) == frozenset()
    assert vary_alike((x, None))[0] is x
    assert result_varying_as(x, (2,), x.dtype).shape == (2,)


def test_operands_vary_alike(mesh):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(SPLIT, WHOLE), out_specs=(SPLIT, SPLIT))
    def run(x, y):
        assert varying_axes(x) == {EXPERT_AXIS}
        assert varying_axes(y) == frozenset()
        alike = vary_alike((x, y, None))
        assert [varying_axes(leaf) for leaf in alike[:2]] == [{EXPERT_AXIS}, {EXPERT_AXIS}]
        assert varying_axes(vary_over(y, frozenset())) == frozenset()
        assert result_varying_as(x, (2,), x.dtype).manual_axis_type.varying == {EXPERT_AXIS}
        return alike[0], alike[1]

    x, y = jax.jit(run)(jnp.arange(8.0), jnp.arange(2.0))
    assert x.tolist() == list(range(8))
    assert y.tolist() == [0, 1] * 4


def test_the_gradient_of_what_did_not_vary_is_summed(mesh):
    run = jax.shard_map(lambda x, y: x * vary_alike((x, y))[1], mesh=mesh, in_specs=(SPLIT, WHOLE), out_specs=SPLIT)
    gradient = jax.jit(jax.grad(lambda y: run(jnp.arange(4.0), y).sum()))(jnp.ones(1))
    assert gradient.tolist() == [6.0]

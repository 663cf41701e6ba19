import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from bench.tpu.pallas_calls import find_kernels
from bench.tpu.static_cycles import profiled_cycles
from bench.tpu.static_twin import dynamic_dims

X = jax.ShapeDtypeStruct((256, 128), jnp.float32)


def double(x, count=2, name="double"):
    """Doubles 128 rows at a time; `count` may be traced."""

    def body(x, out):
        out[...] = 2 * x[...]

    block = pl.BlockSpec((128, 128), lambda i: (i, 0))
    return pl.pallas_call(body, out_shape=X, grid=(count,), in_specs=[block], out_specs=block, name=name)(x)


def kernels(function, *args, **known):
    return find_kernels(jax.jit(function).trace(*args).jaxpr, **known)


def test_calls_of_one_kernel_are_counted_wherever_they_are():
    def function(x):
        x = jax.lax.scan(lambda x, _: (double(x), None), double(x), length=3)[0]
        return jax.jit(double)(x) + double(x, name="other")

    assert [(kernel.name, kernel.calls) for kernel in kernels(function, X)] == [("double", 5), ("other", 1)]


@pytest.mark.parametrize("nested", [False, True])
def test_a_grid_that_follows_from_known_arguments_is_fixed(nested):
    def function(x, sizes):
        count = (sizes.sum() + 127) // 128
        return (jax.jit(double) if nested else double)(x, count)

    sizes = jnp.array([100, 100])
    (unknown,) = kernels(function, X, sizes)
    assert (dynamic_dims(unknown.equation), unknown.grid) == (1, None)
    (known,) = kernels(function, X, sizes, known={1: sizes})
    assert known.grid == (2,)
    function, shapes = known.alone
    static = jax.jit(function).trace(*shapes).jaxpr.eqns[0].params["grid_mapping"]
    assert (static.grid, static.num_dynamic_grid_bounds) == ((2,), 0)


def test_profiles_of_a_folder(tmp_path):
    assert profiled_cycles(tmp_path, "none") == "none"
    for name, cycles in (("copy", 3), ("double.1", 70)):
        (tmp_path / f"{name}_static.textproto").write_text(f'hlo_op_name: "{name}"\n  estimated_cycles: {cycles}\n')
    assert profiled_cycles(tmp_path, "none") == 70
    assert profiled_cycles(tmp_path, "none", total=True) == 73

"""Products of tokens with a kernel [in, out]: those of `flax.nnx.Linear`, whoever computes them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from moejax.models import linear as module
from moejax.models.attention import Attention
from moejax.models.config import AttentionConfig
from moejax.models.linear import project
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, mesh_of, normal, relative_error


def make(**options) -> nnx.Linear:
    return nnx.Linear(64, 128, rngs=nnx.Rngs(0), **({"use_bias": False, "dtype": jnp.bfloat16} | options))


def calls_kernel(linear: nnx.Linear, *shape: int, is_split: bool = False) -> bool:
    with targeting(get_chip("h200")):
        traced = jax.make_jaxpr(lambda x: project(linear, x, is_split=is_split))(jnp.zeros(shape, jnp.bfloat16))
    return "dense_matmul" in str(traced)


def test_the_kernel_is_for_some_hundred_tokens_and_a_plain_product():
    assert calls_kernel(make(), 4, 64, 64)
    assert calls_kernel(make(dtype=None, param_dtype=jnp.bfloat16), 4, 64, 64)
    assert not calls_kernel(make(), 4, 8, 64), "of 32 tokens"
    assert not calls_kernel(make(), 64, 256, 64), "of 16384 tokens"
    assert not calls_kernel(make(), 4, 64, 64, is_split=True)
    assert not calls_kernel(make(use_bias=True), 4, 64, 64)
    assert not calls_kernel(make(dtype=jnp.float32), 4, 64, 64)
    own = make(dot_general=lambda *args, **options: lax.dot_general(*args, **options))
    assert not calls_kernel(own, 4, 64, 64)


@pytest.mark.parametrize("num_rows", [512, 1024])
def test_a_bare_product_of_many_numbers_is_left_to_xla(num_rows):
    with targeting(get_chip("h200")):
        takes = [module.pays(num_rows, 64, 2048, jnp.bfloat16, is_bare=is_bare) for is_bare in (True, False)]
    assert takes == [num_rows == 512, True]


def test_values_and_gradients_are_those_of_the_linear(monkeypatch, rng):
    monkeypatch.setattr(module, "pays", lambda *_, **__: True)
    linear, x = make(), normal(rng, 2, 3, 64)  # float32, which is computed in BF16
    by_kernel = project(linear, x, is_split=False)
    assert (by_kernel.shape, by_kernel.dtype) == ((2, 3, 128), jnp.bfloat16)
    assert relative_error(by_kernel, linear(x)) < LIMIT["bfloat16"]

    def loss(linear, x, run):
        return (run(linear, x).astype(jnp.float32) ** 2).sum()

    ours, theirs = (
        nnx.grad(lambda *args: loss(*args, run), argnums=(0, 1))(linear, x)  # noqa: B023
        for run in (lambda linear, x: project(linear, x, is_split=False), lambda linear, x: linear(x))
    )
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(got, expected) < LIMIT["bfloat16"]


def test_attention_has_it_on_one_chip_alone():
    config = AttentionConfig(64, 2, 2, 32)
    x = jax.ShapeDtypeStruct((4, 64, 64), jnp.bfloat16)

    def traced(attention: Attention) -> str:
        with targeting(get_chip("h200")):
            return str(jax.make_jaxpr(attention)(x))

    assert "dense_matmul" in traced(Attention(config, rngs=nnx.Rngs(0)))
    mesh = mesh_of(data=4)
    assert "dense_matmul" not in traced(Attention(config, rngs=nnx.Rngs(0), mesh=mesh))
    with jax.set_mesh(mesh):
        assert "dense_matmul" not in traced(Attention(config, rngs=nnx.Rngs(0)))

"""Products of tokens with a kernel [in, out]: those of `flax.nnx.Linear`, whoever computes them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moejax.models.attention import Attention
from moejax.models.config import AttentionConfig
from moejax.models.linear import project
from pallas_kernels import dense_matmul
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, mesh_of, normal, relative_error


def make(**options) -> nnx.Linear:
    return nnx.Linear(64, 128, rngs=nnx.Rngs(0), **({"use_bias": False, "dtype": jnp.bfloat16} | options))


def calls_kernel(linear: nnx.Linear, *shape: int, by_kernel: bool = True) -> bool:
    with targeting(get_chip("h200")):
        traced = jax.make_jaxpr(lambda x: project(linear, x, by_kernel=by_kernel))(jnp.zeros(shape, jnp.bfloat16))
    return "dense_matmul" in str(traced)


def test_the_kernel_is_for_some_hundred_tokens_and_a_plain_product():
    assert calls_kernel(make(), 4, 64, 64)
    assert calls_kernel(make(dtype=None, param_dtype=jnp.bfloat16), 4, 64, 64)
    assert not calls_kernel(make(), 4, 8, 64), "of 32 tokens"
    assert not calls_kernel(make(), 64, 256, 64), "of 16384 tokens"
    assert not calls_kernel(make(), 4, 64, 64, by_kernel=False)
    assert not calls_kernel(make(use_bias=True), 4, 64, 64)
    assert not calls_kernel(make(dtype=jnp.float32), 4, 64, 64)
    assert not calls_kernel(make(preferred_element_type=jnp.float32), 4, 64, 64)
    assert not calls_kernel(make(precision="highest"), 4, 64, 64)
    own = make(dot_general=lambda *args, **options: lax.dot_general(*args, **options))
    assert not calls_kernel(own, 4, 64, 64)


def test_values_and_gradients_are_those_of_the_linear(monkeypatch, rng):
    monkeypatch.setattr(dense_matmul, "pays", lambda *_, **__: True)
    linear, x = make(), normal(rng, 2, 3, 64)  # float32, which is computed in BF16
    by_kernel = project(linear, x, by_kernel=True)
    assert (by_kernel.shape, by_kernel.dtype) == ((2, 3, 128), jnp.bfloat16)
    assert relative_error(by_kernel, linear(x)) < LIMIT["bfloat16"]

    def loss(linear, x, run):
        return (run(linear, x).astype(jnp.float32) ** 2).sum()

    ours, theirs = (
        nnx.grad(lambda *args: loss(*args, run), argnums=(0, 1))(linear, x)  # noqa: B023
        for run in (lambda linear, x: project(linear, x, by_kernel=True), lambda linear, x: linear(x))
    )
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(got, expected) < LIMIT["bfloat16"]


def test_attention_has_it_on_one_chip_unless_it_is_to_be_of_xla_alone():
    config = AttentionConfig(64, 2, 2, 32)
    x = jax.ShapeDtypeStruct((4, 64, 64), jnp.bfloat16)

    def traced(attention: Attention) -> str:
        with targeting(get_chip("h200")):
            return str(jax.make_jaxpr(attention)(x))

    assert "dense_matmul" in traced(Attention(config, rngs=nnx.Rngs(0)))
    assert "dense_matmul" not in traced(Attention(dataclasses.replace(config, backend="xla"), rngs=nnx.Rngs(0)))
    mesh = mesh_of(data=4)
    assert "dense_matmul" not in traced(Attention(config, rngs=nnx.Rngs(0), mesh=mesh))
    with jax.set_mesh(mesh):
        assert "dense_matmul" not in traced(Attention(config, rngs=nnx.Rngs(0)))

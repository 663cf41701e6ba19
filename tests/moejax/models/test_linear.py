"""Products of tokens with weights [in, out]: those of `flax.nnx.Linear`, whoever computes them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.models import MLP, BlockConfig, DecoderBlock, MLPConfig
from moejax.models.attention import Attention
from moejax.models.config import AttentionConfig
from moejax.models.linear import project
from moejax.models.norm import RMSNorm
from pallas_kernels import dense_matmul
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, mesh_of, normal, relative_error

DEPTH, COLUMNS = 1024, 512
"""Of weights that are just many enough for the kernel."""

TOKENS = jax.ShapeDtypeStruct((4, 64, DEPTH), jnp.bfloat16)


def make(**options) -> nnx.Linear:
    return nnx.Linear(DEPTH, COLUMNS, rngs=nnx.Rngs(0), **({"use_bias": False, "dtype": jnp.bfloat16} | options))


def traced(run, *args) -> str:
    with targeting(get_chip("h200")):
        return str(jax.make_jaxpr(run)(*args))


def calls_kernel(linear: nnx.Module, *shape: int, dtype=jnp.bfloat16) -> bool:
    x = jax.ShapeDtypeStruct(shape or TOKENS.shape, dtype)
    return "dense_matmul" in traced(lambda x: project(linear, x, made_on=None), x)


def test_the_kernel_is_for_16_to_some_thousand_tokens():
    assert calls_kernel(make())
    assert calls_kernel(make(), 4, 4, DEPTH), "of 16 tokens"
    assert not calls_kernel(make(), 3, 5, DEPTH), "of 15 tokens"
    assert not calls_kernel(make(), 64, 256, DEPTH), "of 16384 tokens"
    assert calls_kernel(make(), 2048, DEPTH)
    wide = nnx.Linear(DEPTH, 2112, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert not calls_kernel(wide, 512, DEPTH), "of more numbers than XLA cuts K for"
    wide.kernel = nnx.Param(wide.kernel[:, :2048])
    assert calls_kernel(wide, 512, DEPTH), "of the kernel that is there"


def test_the_kernel_is_for_what_is_a_product_and_nothing_else():
    assert calls_kernel(make(dtype=None, param_dtype=jnp.bfloat16))
    assert not calls_kernel(make(dtype=None, param_dtype=jnp.bfloat16), dtype=jnp.float16), "multiplied in float32"
    assert not calls_kernel(make(dtype=jnp.float32))
    assert not calls_kernel(make(use_bias=True))
    assert not calls_kernel(make(preferred_element_type=jnp.float32))
    assert not calls_kernel(make(precision="highest"))
    assert not calls_kernel(make(dot_general=lambda *args, **options: lax.dot_general(*args, **options)))
    assert not calls_kernel(make(promote_dtype=lambda args, **options: promote_dtype(args, **options)))


def test_what_stands_in_the_place_of_a_linear_is_called_as_it_is(rng):
    x, linear, rngs = normal(rng, 4, 64, DEPTH, dtype="bfloat16"), make(), nnx.Rngs(0)
    for other in (
        nnx.LoRA(DEPTH, 4, COLUMNS, base_module=linear, rngs=rngs),
        nnx.LoRALinear(DEPTH, COLUMNS, lora_rank=4, use_bias=False, dtype=jnp.bfloat16, rngs=rngs),
        nnx.Sequential(linear, nnx.Dropout(0.0)),
    ):
        assert (project(other, x, made_on=None) == other(x)).all()
        assert not calls_kernel(other)


def test_values_and_gradients_are_those_of_the_linear(monkeypatch, rng):
    monkeypatch.setattr(dense_matmul, "pays", lambda *_, **__: True)
    linear, x = make(), normal(rng, 2, 3, DEPTH)  # float32, which is computed in BF16
    by_kernel = project(linear, x, made_on=None)
    assert (by_kernel.shape, by_kernel.dtype) == ((2, 3, COLUMNS), jnp.bfloat16)
    assert relative_error(by_kernel, linear(x)) < LIMIT["bfloat16"]
    assert project(linear, x[:0], made_on=None).shape == (0, 3, COLUMNS)

    def loss(linear, x, run):
        return (run(linear, x).astype(jnp.float32) ** 2).sum()

    ours, theirs = (
        nnx.grad(lambda *args: loss(*args, run), argnums=(0, 1))(linear, x)  # noqa: B023
        for run in (lambda linear, x: project(linear, x, made_on=None), lambda linear, x: linear(x))
    )
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(got, expected) < LIMIT["bfloat16"]


@pytest.mark.parametrize("of_weights", [False, True])
def test_a_batch_is_xlas_in_one_product(of_weights, monkeypatch, rng):
    monkeypatch.setattr(dense_matmul, "pays", lambda *_, **__: True)
    x, weights = normal(rng, 3, 5, DEPTH, dtype="bfloat16"), normal(rng, 3, DEPTH, COLUMNS, dtype="bfloat16")

    def run(x, weights):
        linear = make()
        linear.kernel = nnx.Param(weights)
        return project(linear, x, made_on=None)

    batched = jax.vmap(run, (0, 0 if of_weights else None))
    operands = x, weights if of_weights else weights[0]
    expected = jnp.einsum("bth,bhn->btn" if of_weights else "bth,hn->btn", *operands)
    assert relative_error(batched(*operands), expected) < LIMIT["bfloat16"]
    assert "dense_matmul" not in traced(batched, *operands)
    assert "dense_matmul" not in traced(jax.grad(lambda *args: batched(*args).astype(jnp.float32).sum()), *operands)


def test_attention_has_it_on_one_chip_unless_it_is_to_be_of_xla_alone():
    config, mesh = AttentionConfig(DEPTH, 2, 2, COLUMNS // 2), mesh_of(data=4)

    def has_it(attention: Attention) -> bool:
        calls = traced(attention, TOKENS).count("dense_matmul[")
        assert calls in (0, 2), "one of its two products only"
        return calls == 2

    assert has_it(Attention(config, rngs=nnx.Rngs(0)))
    assert has_it(Attention(config, rngs=nnx.Rngs(0), mesh=mesh_of(data=1)))
    assert not has_it(Attention(dataclasses.replace(config, backend="xla"), rngs=nnx.Rngs(0)))
    assert not has_it(Attention(config, rngs=nnx.Rngs(0), mesh=mesh))
    block = BlockConfig(config, MLPConfig(DEPTH, COLUMNS))
    assert has_it(DecoderBlock(block, rngs=nnx.Rngs(0)).attention)
    assert not has_it(DecoderBlock(block, rngs=nnx.Rngs(0), mesh=mesh).attention)
    with jax.set_mesh(mesh):
        made_there = Attention(config, rngs=nnx.Rngs(0))
        assert not has_it(made_there)
        assert not has_it(Attention(config, rngs=nnx.Rngs(0), mesh=mesh_of(data=4)))
    assert not has_it(made_there)


def test_attention_by_cudnn_has_it():
    """cuDNN itself is asked for while tracing, and is not here."""
    attention = Attention(AttentionConfig(DEPTH, 2, 2, COLUMNS // 2, backend="cudnn"), rngs=nnx.Rngs(0))
    assert "dense_matmul" in traced(lambda x: attention._project(attention.qkv, x), TOKENS)


def test_weights_that_explicit_axes_split_are_left_to_xla():
    mesh = mesh_of(AxisType.Explicit, data=4)

    def run(x, weights):
        linear = make(dtype=None, param_dtype=jnp.bfloat16)
        linear.kernel = nnx.Param(weights)
        return project(linear, x, made_on=None)

    x, weights = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in ((TOKENS.shape, PartitionSpec()), ((DEPTH, COLUMNS), PartitionSpec(None, "data")))
    )
    assert "dense_matmul" not in traced(run, x, weights)


@pytest.mark.parametrize("size", [1, 4])
def test_what_explicit_axes_split_is_left_to_xla(size):
    """By the types of arrays, where no mesh is in force either."""
    mesh = mesh_of(AxisType.Explicit, data=size)
    x = jax.ShapeDtypeStruct((4, 128, DEPTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    attention = Attention(AttentionConfig(DEPTH, 2, 2, COLUMNS // 2), rngs=nnx.Rngs(0))
    for module in attention, MLP(MLPConfig(DEPTH, COLUMNS), rngs=nnx.Rngs(0)):
        assert not any(f"{name}[" in traced(module, x) for name in ("dense_matmul", "dense_gate_up"))
    seen, norm = [], RMSNorm(DEPTH, rngs=nnx.Rngs(0))
    jax.eval_shape(lambda x: seen.append(norm._backend_here(x, None)), x)
    assert seen == ["xla"]

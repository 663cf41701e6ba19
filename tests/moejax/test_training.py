"""A small model trained with optax on 8 devices: the loss falls, and its gradients are the dense oracle's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moejax import MoE, MoEConfig, Quantization, dense_moe, get_preset, make_mesh, moe
from tests.helpers import normal, relative_error, same_bits
from tests.moejax.layers import random_params

VOCABULARY, HIDDEN, BATCH, LENGTH, STEPS = 64, 64, 16, 12, 25
CONFIG = get_preset(
    "deepseek-v3",
    hidden_size=HIDDEN,
    intermediate_size=32,
    shared_intermediate_size=32,
    num_experts=16,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    load_balance_loss=0.01,
    z_loss=1e-3,
    dtype=jnp.float32,
)


class Model(nnx.Module):
    """Next-token prediction: embedding, a Mixture-of-Experts layer with a residual, and the embedding again."""

    def __init__(self, *, rngs: nnx.Rngs, mesh=None):
        self.embedding = nnx.Param(0.1 * jax.random.normal(rngs.params(), (VOCABULARY, HIDDEN)))
        self.moe = MoE(CONFIG, rngs=rngs, mesh=mesh)

    def __call__(self, ids: jax.Array, use_oracle: bool = False):
        x = self.embedding[...][ids]
        if use_oracle:
            y, aux_loss = dense_moe(x, self.moe.params(), CONFIG), 0.0
        else:
            y, aux = self.moe(x)
            aux_loss = aux.loss
        return (x + y) @ self.embedding[...].T, aux_loss


def cross_entropy(model: Model, ids: jax.Array, *, use_oracle: bool = False, with_aux: bool = True) -> jax.Array:
    logits, aux_loss = model(ids[:, :-1], use_oracle)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
    return loss + aux_loss if with_aux else loss


def sequences(rng: np.random.Generator) -> np.ndarray:
    """Counting in steps of 1 or 3 from a random start: easy to predict, not trivial."""
    start, step = rng.integers(VOCABULARY, size=(BATCH, 1)), rng.choice([1, 3], size=(BATCH, 1))
    return ((start + step * np.arange(LENGTH + 1)) % VOCABULARY).astype(np.int32)


@pytest.mark.slow
def test_training_on_eight_devices_lowers_the_loss(rng):
    mesh = make_mesh(ep=4, dp=2)
    with jax.set_mesh(mesh):
        model = Model(rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer, ids):
            loss, gradients = nnx.value_and_grad(lambda m: cross_entropy(m, ids))(model)
            optimizer.update(model, gradients)
            return loss

        split = NamedSharding(mesh, PartitionSpec("data"))
        losses = [float(train_step(model, optimizer, jax.device_put(sequences(rng), split))) for _ in range(STEPS)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.6 * losses[0], losses
    # The experts stayed where they were, four chips each with a quarter.
    assert model.moe.gate_up[...].sharding.spec[0] == "expert"


@pytest.mark.slow
def test_gradients_on_eight_devices_equal_the_oracle(rng):
    mesh = make_mesh(ep=4, dp=2)
    ids = jnp.asarray(sequences(rng))
    single = Model(rngs=nnx.Rngs(1))
    expected = nnx.jit(nnx.grad(lambda m: cross_entropy(m, ids, use_oracle=True)))(single)
    with jax.set_mesh(mesh):
        model = Model(rngs=nnx.Rngs(1))
        got = nnx.jit(nnx.grad(lambda m: cross_entropy(m, ids, with_aux=False)))(model)
    expected, got = nnx.to_pure_dict(nnx.state(expected)), nnx.to_pure_dict(nnx.state(got))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for (path, leaf), ref in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(leaf, ref) < 1e-5, jax.tree_util.keystr(path)


IN_FP8 = Quantization(gradient_dtype="float8_e4m3fn", weights_gradient_dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "w8a8", "quantization": IN_FP8}], ids=["bfloat16", "all products in FP8"]
)
@pytest.mark.quick("all*")
def test_gradients_add_up_in_place(rng, settings):
    """In refs, as in sums that a scan carries."""
    config = MoEConfig(128, 128, 4, 2, dtype=jnp.bfloat16, **settings)
    params, batches = random_params(config, rng), normal(rng, 3, 32, 128, dtype="bfloat16")

    def loss(params, x):
        return jnp.square(moe(x, params, config)[0].astype(jnp.float32)).sum()

    @jax.jit
    def carried(params, batches):
        def add_part(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        return jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, params), batches)[0]

    @jax.jit
    def in_place(params, batches):
        sums = jax.tree.map(lambda w: jax.new_ref(jnp.zeros_like(w)), params)

        def add_part(_, x):
            total, pullback = jax.vjp(lambda params: loss(params, x), params)
            pullback.with_refs(sums)(jnp.ones_like(total))
            return None, total

        jax.lax.scan(add_part, None, batches)
        return jax.tree.map(jax.freeze, sums)

    assert same_bits(in_place(params, batches), carried(params, batches))

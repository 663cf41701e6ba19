"""Attention over whole sequences against the float64 oracle, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.models import Attention, AttentionConfig, KVCache, RMSNorm, dot_product
from moejax.models.dot_product import best_backend
from moejax.models.rotary import beside_rotated, rotate
from pallas_kernels.rms_norm import rms_norm
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.moejax.models import oracle

CONFIGS = {
    "groups": AttentionConfig(24, 6, 2, 4, rope_theta=1e6, qk_norm=True),
    "one group": AttentionConfig(16, 4, 1, 6, attention_bias=True),
}


def random_attention(rng, config: AttentionConfig) -> Attention:
    """With norms and biases that are not trivial."""

    def draw(leaf):
        return jnp.asarray(rng.normal(1.0 if leaf.shape == (config.head_dim,) else 0.0, 0.3, leaf.shape), leaf.dtype)

    graph, state = nnx.split(Attention(config, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(draw, state))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.quick("groups-all", "one group-masked")
def test_equals_the_oracle(rng, name, masked):
    config = dataclasses.replace(CONFIGS[name], dtype=jnp.float32)
    attention, x = random_attention(rng, config), normal(rng, 2, 7, config.hidden_size)
    mask = jnp.asarray(rng.random((2, 7)) < 0.7) if masked else None
    y = jax.jit(lambda x: attention(x, mask=mask))(x)
    params = oracle.values(nnx.state(attention))
    assert relative_error(y, oracle.attention(params, float64(x), config, mask)) < LIMIT["float32"]
    if masked:
        assert not np.asarray(y)[~np.asarray(mask)].any()


def test_in_bfloat16_it_is_near_the_oracle(rng):
    config = CONFIGS["groups"]
    attention, x = random_attention(rng, config), normal(rng, 2, 7, config.hidden_size, dtype=jnp.bfloat16)
    y = jax.jit(attention)(x)
    assert y.dtype == jnp.bfloat16
    expected = oracle.attention(oracle.values(nnx.state(attention)), float64(x), config)
    assert relative_error(y, expected) < 4 * LIMIT["bfloat16"]  # rounded four times on the way


def test_rotated_products_depend_on_the_distance_only(rng):
    q, k = (jnp.broadcast_to(normal(rng, 8), (1, 12, 1, 8)) for _ in range(2))
    q, k = (rotate(each, jnp.arange(12), 10_000.0)[0, :, 0] for each in (q, k))
    products = np.asarray(q @ k.T)
    for distance in (-3, 0, 5):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products[0]) > 1e-2


def test_the_norm_equals_the_oracle_and_returns_the_sum(rng):
    x, residual = normal(rng, 3, 8), normal(rng, 3, 8)
    norm = RMSNorm(8, eps=1e-3, rngs=nnx.Rngs(0), scale_init=nnx.initializers.normal(1.0))
    y, total = norm(x, residual=residual)
    np.testing.assert_array_equal(total, x + residual)
    expected = oracle.rms_norm(float64(total), float64(norm.scale[...]), 1e-3)
    assert relative_error(y, expected) < LIMIT["float32"]
    np.testing.assert_array_equal(norm(total), y)
    with raises_saying(ValueError, "residual must be as x, float32[3, 8]", "bfloat16[3, 8]"):
        norm(x, residual=residual.astype(jnp.bfloat16))
    with raises_saying(TypeError, "x must be an array, got list"):
        norm([[1.0] * 8])
    with raises_saying(TypeError, "weight must be an array, got list"):
        rms_norm(x, [1.0] * 8)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_xla_does_the_product():
    assert best_backend(*heads(1, 4096)) == "xla"


def heads(num_queries, num_keys, *, batch=1, num=16, head_dim=128, dtype=jnp.bfloat16):
    """Queries and keys, without numbers."""
    return [jax.ShapeDtypeStruct((batch, length, num, head_dim), dtype) for length in (num_queries, num_keys)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (heads(128, 256), "cudnn"),
        (heads(128, 129), "cudnn"),
        (heads(128, 128), "xla"),
        (heads(64, 64, batch=4), "xla"),
        (heads(64, 64, batch=8), "cudnn"),
        (heads(1, 65), "cudnn"),
        (heads(1, 64, batch=64), "xla"),
        (heads(512, 512, dtype=jnp.float32), "xla"),
        (heads(512, 512, head_dim=264), "xla"),
    ],
)
def test_cudnn_is_for_16_bits_and_more_than_a_few_logits(monkeypatch, sizes, expected):
    monkeypatch.setattr("moejax.models.dot_product._nvidia_capability", lambda: 9.0)
    assert best_backend(*sizes) == expected


def test_auto_asks_for_the_backend_that_is_best(rng, monkeypatch):
    asked = []
    monkeypatch.setattr(dot_product, "best_backend", lambda q, k: asked.append((q.shape, k.shape)) or "xla")
    dot_product.attend(normal(rng, 1, 1, 2, 8), normal(rng, 1, 9, 2, 8), normal(rng, 1, 9, 2, 8), backend="auto")
    assert asked == [((1, 1, 2, 8), (1, 9, 2, 8))]


def test_a_norm_of_few_numbers_is_xlas_unless_a_backend_is_named():
    for asked, few, many in (("auto", "xla", "auto"), ("pallas_gpu", "pallas_gpu", "pallas_gpu")):
        norm = RMSNorm(8, backend=asked, rngs=nnx.Rngs(0))
        arrays = (jax.ShapeDtypeStruct((size,), jnp.bfloat16) for size in (1 << 17, (1 << 17) + 1))
        assert [norm._backend_here(x, None) for x in arrays] == [few, many]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads=2, got 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rope_theta": 0.0}, "rope_theta must be positive and finite, got 0.0"),
        ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, got 'int8'"),
        ({"backend": "triton"}, "backend must be one of 'auto', 'cudnn', 'xla', got 'triton'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with raises_saying(ValueError, message):
        dataclasses.replace(CONFIGS["groups"], **changes)


def test_cudnn_is_refused_where_there_is_no_nvidia_gpu(monkeypatch, rng):
    monkeypatch.setattr("moejax.models.dot_product._nvidia_capability", lambda: 0.0)
    with raises_saying(ValueError, "backend 'cudnn' of attention needs an NVIDIA GPU", "'auto' or 'xla'"):
        dot_product.attend(*(normal(rng, 1, 2, 2, 8) for _ in range(3)), backend="cudnn")


def test_inputs_that_do_not_fit_are_refused():
    attention = Attention(CONFIGS["groups"], rngs=nnx.Rngs(0))
    for x in (jnp.zeros((3, 24)), jnp.zeros((2, 3, 16)), jnp.zeros((2, 0, 24))):
        with raises_saying(ValueError, "x must be [B, L, H] with hidden_size=24", f"got {list(x.shape)}"):
            attention(x)
    with raises_saying(ValueError, "x must be BF16, FP16 or float32 activations, got 'int32'"):
        attention(jnp.zeros((2, 3, 24), int))
    with raises_saying(ValueError, "mask must be bool [2, 3], got", "float32[2, 3]"):
        attention(jnp.zeros((2, 3, 24)), mask=jnp.ones((2, 3)))


def test_positions_are_float32_in_bfloat16_too(rng):
    x = normal(rng, 1, 1, 1, 8, dtype=jnp.bfloat16)
    wide = rotate(x.astype(jnp.float32), jnp.array([1001]), 1e4)
    assert relative_error(rotate(x, jnp.array([1001]), 1e4), wide) < LIMIT["bfloat16"]
    np.testing.assert_array_equal(rotate(x, jnp.array([1001]), 1e4), wide.astype(jnp.bfloat16))


def test_values_beside_what_turns_are_as_they_were(rng):
    x = (
        normal(rng, 1, 5, 2, 8, dtype=jnp.bfloat16)
        .at[0, 1, 0, :3]
        .set(jnp.array([jnp.nan, jnp.inf, -0.0], jnp.bfloat16))
    )
    y, pullback = jax.vjp(lambda x: beside_rotated(x, jnp.array([0, 1, 7, 100, 131_071]), 1e4), x)
    np.testing.assert_array_equal(y.view(jnp.uint16), x.view(jnp.uint16))
    np.testing.assert_array_equal(*pullback(jnp.ones_like(x)), jnp.ones_like(x))


def test_what_lies_behind_a_prompt_is_never_data(rng):
    attention, lengths = Attention(CONFIGS["groups"], rngs=nnx.Rngs(0)), jnp.array([2, 4])
    x = normal(rng, 2, 5, 24)
    broken = jnp.where((jnp.arange(5) < lengths[:, None])[..., None], x, jnp.nan)
    cache = KVCache.empty(CONFIGS["groups"], num_slots=2, max_length=8)
    found = [attention.prefill(each, cache, slots=jnp.arange(2), lengths=lengths) for each in (x, broken)]
    for clean, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(clean, other)

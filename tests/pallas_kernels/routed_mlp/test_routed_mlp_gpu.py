"""The kernel for Hopper on a machine without one: interpreted launch by launch; and where it is taken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import MoEConfig, experts, moe, quantize_params
from moejax.params import param_shapes
from pallas_kernels.chips import get_chip
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.quantize import QTensor, ToRound, quantize
from pallas_kernels.routed_mlp import gpu, pays
from pallas_kernels.routed_mlp.gpu.sizes import Config, Sizes
from pallas_kernels.routed_mlp.gpu.tokens import in_tiles
from pallas_kernels.tracing.target import targeting
from tests.helpers import normal, relative_error
from tests.pallas_kernels.kernels_gpu import interpreted
from tests.pallas_kernels.routed_mlp.test_routed_mlp import TOLERANCE, expected, make

PLAIN = {"activation": "silu", "activation_limit": None, "out_dtype": jnp.float32}


@pytest.mark.parametrize(
    ("tokens", "top_k", "sizes", "config"),
    [
        (2, 2, {"hidden": 128, "width": 128, "experts": 3}, Config(16, 16, 4, 2, 2)),
        (3, 1, {"hidden": 144, "width": 80, "experts": 3, "scales": "rows", "bias": True}, Config(16, 8, 4, 2, 2)),
    ],
    ids=["blocks", "rows"],
)
@pytest.mark.slow
def test_interpreted(tokens, top_k, sizes, config, rng):
    """In three launches: interpret mode has no semaphores, for which the blocks wait in one."""
    operands = make(rng, tokens, top_k, **sizes)
    with interpreted(), single_view(True):
        y = jax.jit(lambda o: gpu.routed_mlp(**o, **PLAIN, config=config, in_one_launch=False))(operands)
    assert relative_error(y, expected(operands, sizes.get("scales", "blocks"))) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "hidden", "of", "dtype"),
    [
        (1, 2048, "bfloat16", "float8_e4m3fn"),
        (3, 1024, "float32", "float8_e5m2"),
        (8, 1536, "float16", "float8_e4m3fn"),  # no whole number of the kernel's rows: rounded, then laid out
        (5, 3072, "bfloat16", "float8_e4m3fn"),
    ],
    ids=str,
)
@pytest.mark.quick("1-*", "3-*")
def test_tokens_in_tiles_interpreted(tokens, hidden, of, dtype, rng):
    """As rounded before and laid out by XLA, zeros past the tokens too; NaN stays in its block."""
    x = normal(rng, tokens, hidden, dtype=of).at[0, 130].set(jnp.nan)
    sizes = Sizes(tokens, 4, hidden, 256, True, Config(16, 16, 2, 2, 1))
    with interpreted():
        tiles, scale = in_tiles(ToRound(x, dtype), sizes)
    right, right_scale = in_tiles(quantize(x, dtype, scaling="1x128"), sizes)
    np.testing.assert_array_equal(tiles.astype("float32"), right.astype("float32"))
    np.testing.assert_array_equal(scale, right_scale)


CORNERS = {
    "blocks of several scales": (
        [[1, 0, 1], [3, 0, 2]],
        {"hidden": 256, "width": 256, "experts": 3, "residual": "bfloat16"},
        Config(32, 32, 4, 2, 2),
    ),
    "rows of several depths": (
        [[1, 1]],
        {"hidden": 128, "width": 1152, "experts": 2, "scales": "rows", "residual": "float32"},
        Config(16, 16, 4, 2, 2),
    ),
    "rows of two groups": (
        [[1, 1]],
        {"hidden": 128, "width": 144, "experts": 2, "scales": "rows", "residual": "float32"},
        Config(16, 16, 4, 2, 2),
    ),
    "64 choices": (None, {"hidden": 128, "width": 128, "experts": 2}, Config(64, 64, 4, 2, 1)),
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.quick("blocks*", "rows of two*")
def test_interpreted_corners(name, rng):
    """Choices that come twice, scales that no other one can stand in for, and an expert of NaN."""
    ids, sizes, config = CORNERS[name]
    ids = rng.integers(-2, 4, (8, 8)) if ids is None else ids
    operands = make(rng, len(ids), 2, **sizes)
    operands |= {
        "topk_ids": jnp.asarray(ids, jnp.int32),
        "topk_weights": jnp.asarray(0.5 + rng.random(np.shape(ids)), jnp.float32),
    }
    for each in ("gate_up", "down"):
        q = operands[each]
        factor = jnp.asarray(rng.choice([0.5, 1.0, 2.0], q.scale.shape), jnp.float32)
        operands[each] = QTensor(q.values, q.scale * factor)
    if sizes.get("scales") == "rows":  # the last tile of h has the largest numbers
        q = operands["gate_up"]
        operands["gate_up"] = QTensor(q.values, q.scale.at[:, -16:].multiply(16))
    whole, fine = expected(operands, sizes.get("scales", "blocks")), jnp.arange(len(ids))
    if len(ids) == 2:  # which harms those alone who have chosen it
        q = operands["down"]
        operands["down"], fine = QTensor(q.values, q.scale.at[1].set(jnp.nan)), jnp.array([1])
    with interpreted(), single_view(True):
        y = jax.jit(lambda o: gpu.routed_mlp(**o, **PLAIN, config=config, in_one_launch=False))(operands)
    assert relative_error(y[fine], whole[np.asarray(fine)]) < TOLERANCE


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "swigluoai", "activation_limit": 0.5, "expert_bias": True}], ids=["plain", "clamped"]
)
@pytest.mark.quick("clamped")
def test_a_layer_takes_it_where_it_pays_and_no_gradient_is_asked_for(monkeypatch, rng, changes):
    config = MoEConfig(256, 128, 8, 4, precision="w8a8", **changes)
    shapes = param_shapes(config)
    drawn = jax.tree.map(lambda s: normal(rng, *s) / s[-1] ** 0.5, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    params = quantize_params(drawn, config)
    x = normal(rng, 4, 256, dtype="bfloat16")

    def layer(x):
        return moe(x, params, config)[0]

    plain = np.asarray(jax.jit(layer)(x), np.float64)
    monkeypatch.setattr(experts, "pays", lambda *_: True)
    jax.clear_caches()
    try:
        assert "routed_mlp" in str(jax.make_jaxpr(layer)(x))
        assert relative_error(jax.jit(lambda x: layer(x))(x), plain) < TOLERANCE
        assert "routed_mlp" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).astype(jnp.float32).sum()))(x))
    finally:
        jax.clear_caches()


@pytest.mark.parametrize(
    ("tokens", "top_k", "options", "chip", "is_taken"),
    [
        (8, 8, {}, "h200", True),
        (1, 4, {}, "h100", True),
        (9, 2, {}, "h200", False),
        (8, 9, {"experts": 16}, "h200", False),
        (2, 2, {"scales": "rows"}, "h200", True),
        (2, 2, {}, "v6e", False),
    ],
)
def test_where_it_is_taken(tokens, top_k, options, chip, is_taken, rng):
    operands = jax.eval_shape(lambda: make(rng, tokens, top_k, **{"experts": 8} | options))
    with targeting(get_chip(chip)):
        assert pays(*(operands[name] for name in ("x", "topk_ids", "gate_up", "down"))) == is_taken


def test_not_where_there_is_no_gpu(rng):
    operands = jax.eval_shape(lambda: make(rng, 2, 2))
    assert not pays(*(operands[name] for name in ("x", "topk_ids", "gate_up", "down")))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 9])
def test_a_layer_of_few_tokens(num_tokens, rng):
    """On both sides of the border the layer is what plain XLA makes it."""
    config = MoEConfig(hidden_size=512, intermediate_size=256, num_experts=16, top_k=4, precision="w8a8")
    shapes = param_shapes(config)
    params = jax.tree.map(
        lambda s: normal(rng, *s) / s[-1] ** 0.5, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    params = quantize_params(params, config)
    x = normal(rng, num_tokens, config.hidden_size, dtype="bfloat16")
    y, _ = jax.jit(lambda x: moe(x, params, config))(x)
    expected_y, _ = jax.jit(lambda x: moe(x, params, dataclasses.replace(config, backend="xla")))(x)
    assert relative_error(y, np.asarray(expected_y, np.float64)) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("scales", "tokens"), [("blocks", 1), ("blocks", 8), ("rows", 3), ("rows", 8)])
def test_a_thousand_launches_whose_blocks_wait_for_each_other(scales, tokens, rng):
    """Each as the three launches in which none waits, among buffers of NaN, in a program that XLA may capture."""
    operands = make(rng, tokens, 4, hidden=1024, width=512, experts=24, scales=scales, residual="bfloat16")

    def agree(operands, key):
        of_ids, of_weights = jax.random.split(key)
        drawn = operands | {
            "topk_ids": jax.random.randint(of_ids, (tokens, 4), -1, 24),
            "topk_weights": jax.random.uniform(of_weights, (tokens, 4)),
        }
        drawn, _ = jax.lax.optimization_barrier((drawn, jnp.full(1 << 22, jnp.nan)))  # where results will lie
        at_once, one_by_one = (gpu.routed_mlp(**drawn, **PLAIN, in_one_launch=is_one) for is_one in (True, False))
        return (at_once == one_by_one).all() & jnp.isfinite(at_once).all()

    keys = jax.random.split(jax.random.key(0), 1000)
    assert jax.jit(lambda operands, keys: jax.lax.map(functools.partial(agree, operands), keys))(operands, keys).all()

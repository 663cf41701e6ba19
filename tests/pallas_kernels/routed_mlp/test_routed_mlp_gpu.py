"""The kernel for Hopper on a machine without one: interpreted launch by launch; and where it is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import MoEConfig, moe, quantize_params
from moejax.params import param_shapes
from pallas_kernels.chips import get_chip
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.routed_mlp import gpu, pays
from pallas_kernels.routed_mlp.gpu.sizes import Config
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
def test_interpreted(tokens, top_k, sizes, config, rng):
    """In three launches: interpret mode has no semaphores, for which the blocks wait in one."""
    operands = make(rng, tokens, top_k, **sizes)
    with interpreted(), single_view(True):
        y = jax.jit(lambda o: gpu.routed_mlp(**o, **PLAIN, config=config, in_one_launch=False))(operands)
    assert relative_error(y, expected(operands, sizes.get("scales", "blocks"))) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "top_k", "options", "chip", "is_taken"),
    [
        (8, 8, {}, "h200", True),
        (1, 4, {}, "h100", True),
        (9, 2, {}, "h200", False),
        (8, 9, {"experts": 16}, "h200", False),
        (2, 2, {"scales": "rows"}, "h200", False),
        (2, 2, {}, "v6e", False),
    ],
)
def test_where_it_is_taken(tokens, top_k, options, chip, is_taken, rng):
    operands = make(rng, tokens, top_k, **{"experts": 8} | options)
    with targeting(get_chip(chip)):
        assert pays(*(operands[name] for name in ("x", "topk_ids", "gate_up", "down"))) == is_taken


def test_not_where_there_is_no_gpu(rng):
    operands = make(rng, 2, 2)
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

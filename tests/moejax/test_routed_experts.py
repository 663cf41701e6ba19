"""Weights of rows before down: gradients where all experts are here, whole or in parts, and where they are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moejax import MoEConfig, Partition, moe_experts
from pallas_kernels.activations import gated
from sharding.exchange import Way, sum_of_weighed_rows
from sharding.partition import Axes
from sharding.placement import Placement
from tests.helpers import normal, relative_error
from tests.moejax.layers import random_params

CONFIG = MoEConfig(8, 4, 4, 3, activation="swigluoai", activation_limit=0.5, dtype=jnp.float32)
PARTITIONS = {
    "one chip": None,
    "tp": Partition(expert=None, mlp="chip", tokens="chip"),
    "ep": Partition(expert="chip", tokens="chip"),
}


def oracle(x, topk_weights, topk_ids, params):
    """Every expert on every token."""
    share = jnp.where(topk_ids[:, :, None] == jnp.arange(4), topk_weights[:, :, None], 0).sum(1)
    both = jnp.einsum("th,ehji->jtei", x, params.gate_up, precision="highest")
    if params.gate_up_bias is not None:
        both += jnp.moveaxis(params.gate_up_bias, 1, 0)[:, None]
    h = gated(both[0], both[1], CONFIG.activation, CONFIG.activation_limit)
    y = jnp.einsum("tei,eih->teh", h, params.down, precision="highest")
    y = y if params.down_bias is None else y + params.down_bias
    return jnp.einsum("te,teh->th", share, y, precision="highest")


@pytest.mark.parametrize(
    ("name", "expert_bias"), [("one chip", True), ("tp", True), ("tp", False), ("ep", True)], ids=str
)
@pytest.mark.quick("tp-False", "ep-True")
def test_gradients_of_choices_that_are_made_twice_or_not_at_all(rng, name, expert_bias):
    partition, mesh, config = PARTITIONS[name], None, dataclasses.replace(CONFIG, expert_bias=expert_bias)
    if partition is not None:
        mesh = jax.make_mesh((2,), ("chip",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x, topk_weights, direction = normal(rng, 6, 8), normal(rng, 6, 3).at[0, 0].set(0), normal(rng, 6, 8)
    topk_ids = jnp.array([[0, 1, 2], [3, 3, 0], [-1, 2, -1], [1, 1, 1], [-1, -1, -1], [2, 0, 3]], jnp.int32)

    def layer(x, topk_weights, params):
        return moe_experts(x, topk_weights, topk_ids, params, config, mesh=mesh, partition=partition)[0]

    def with_gradients(function):
        def loss(*args):
            y = function(*args)
            return (y * direction).sum(), y

        return jax.jit(lambda *args: jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*args))

    args = x, topk_weights, dataclasses.replace(random_params(config, rng), router=None)
    got = with_gradients(layer)(*args)
    right = with_gradients(lambda x, topk_weights, params: oracle(x, topk_weights, topk_ids, params))(*args)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_rows_that_hold_no_token_weigh_nothing(rng):
    weights, seen = jnp.arange(1.0, 7).reshape(3, 2), []

    def experts(params, x, row_weights, plan, *, preferred_element_type):
        jax.debug.callback(seen.append, row_weights)
        return x.astype(preferred_element_type)

    way = Way(Placement(4, 1), Axes(), backend="xla")
    topk_ids = jnp.array([[3, 0], [-1, 1], [0, -1]], jnp.int32)
    sum_of_weighed_rows(experts, normal(rng, 3, 8), weights, topk_ids, {}, way, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(seen[0], [2, 5, 4, 1, 0, 0])

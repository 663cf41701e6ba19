"""The seven stages, one by one, are the layer."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from moejax import Partition, make_mesh, moe, param_specs
from moejax.axes import axes_on
from moejax.experts import math_of
from moejax.stages import Stages, way_of
from sharding.tokens import Tokens
from tests.helpers import LIMIT, raises_saying, relative_error
from tests.moejax.layers import clear_cut_tokens, narrow, random_params


@pytest.mark.parametrize("preset", ["llama-4-maverick", "gpt-oss-120b"])  # one weighs its inputs, one has biases
def test_one_by_one_they_are_the_layer(preset, rng):
    config = narrow(preset, precision="w16a16", dtype=jnp.dtype("float32"))
    params, mesh = random_params(config, rng), make_mesh(4)
    x = clear_cut_tokens(32, config, params, rng)
    axes = axes_on(mesh, None, config)
    way = dataclasses.replace(way_of(config, axes), slab=8 * config.top_k)
    stages = Stages(config, way, math_of(config))

    def on_chip(x, params):
        routing = stages.route(x, params, Tokens.on_one_chip(x.shape[0])).routing
        plan = stages.plan(routing.topk_ids)
        inputs, weights = stages.inputs(x, routing.topk_weights)
        h = stages.gate_up(stages.send(inputs, plan), plan, params)
        slots = stages.give_back(stages.down(h, plan, params), plan)
        return stages.combine(slots, plan, weights, preferred_element_type=x.dtype)

    config_without_shared = dataclasses.replace(config, shared_intermediate_size=0, shared_gate=False)
    split = PartitionSpec(axes.tokens)
    run = jax.shard_map(on_chip, mesh=mesh, in_specs=(split, param_specs(params, config, axes)), out_specs=split)
    own = {name: None for name in ("shared_gate_up", "shared_down", "shared_gate")}
    expected, _ = moe(x, dataclasses.replace(params, **own), config_without_shared)
    assert relative_error(jax.jit(run)(x, params), expected) < LIMIT["float32"]


def test_a_bias_over_a_tensor_axis_is_refused(rng):
    config = narrow("gpt-oss-120b")
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), devices=jax.devices()[:4])
    stages = Stages(config, way_of(config, axes_on(mesh, Partition(), config)), math_of(config))
    with raises_saying(ValueError, "down_bias", "routed"):
        stages.down(jnp.zeros((8, 8)), None, random_params(config, rng))

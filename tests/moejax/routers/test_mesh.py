"""Layers of every router over a mesh equal those of one chip: output, losses, load and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moejax import Partition, make_mesh
from tests.helpers import LIMIT, float64, relative_error, same_bits
from tests.moejax.routers.layers import CONFIG, by_path, case, inference, new_layer, values_and_gradients


@functools.cache
def mesh_of(axis_type) -> jax.sharding.Mesh:
    return make_mesh(ep=2, dp=2, axis_type=axis_type)


def check(name, mesh):
    """Ten tokens, which four chips do not divide evenly."""
    _, _, x, target, y, aux, gradients = case(name)
    with jax.set_mesh(mesh):
        layer = new_layer(name, np.random.default_rng(0))
        assert layer.gate_up[...].sharding.spec[0] == "expert"
        (_, (mesh_y, mesh_aux)), (of_layer, of_x) = values_and_gradients(layer, x, target)
    assert relative_error(mesh_y, y) < LIMIT["float32"]
    assert same_bits((mesh_aux.load, mesh_aux.topk_ids), (aux.load, aux.topk_ids))
    assert relative_error(mesh_aux.topk_weights, aux.topk_weights) < LIMIT["float32"]
    for loss_name, loss in aux.losses.items():
        np.testing.assert_allclose(mesh_aux.losses[loss_name], loss, rtol=1e-5, err_msg=loss_name)
    mesh_gradients = by_path(of_layer) | {"x": float64(of_x)}
    assert set(mesh_gradients) == set(gradients)
    for path, gradient in gradients.items():
        assert relative_error(mesh_gradients[path], gradient) < LIMIT["float32"], path


# The others differ from one of these only in scores, which know of no mesh.
@pytest.mark.parametrize(
    "name", ["noisy_top_k", "switch", "loss_free", "expert_choice", "soft_moe", "chain_of_experts", "specialized"]
)
@pytest.mark.quick("expert_choice")
def test_a_mesh_equals_one_chip(name):
    check(name, mesh_of(AxisType.Auto))


@pytest.mark.slow
def test_a_mesh_of_explicit_axes_equals_one_chip():
    check("noisy_top_k", mesh_of(AxisType.Explicit))


@pytest.mark.slow
def test_no_choice_is_made_for_padding():
    """Of the twelve places on four chips two hold no token."""
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        _, aux = inference(new_layer("softmax"), jnp.ones((10, CONFIG.hidden_size)))
    np.testing.assert_array_equal(aux.load.tokens_per_expert.sum(), 10 * CONFIG.top_k)
    assert int(aux.load.dropped) == int(aux.load.unrouted) == 0


def all_for_expert_3(**changes):
    """What becomes of sixteen equal tokens."""
    layer = new_layer("switch", config=dataclasses.replace(CONFIG, capacity_factor=1.0, **changes))
    layer.router["kernel"][...] = jnp.zeros((16, 8)).at[0, 3].set(1.0)
    routed, aux = inference(layer, jnp.ones((16, 16)))
    kept = (
        np.abs(np.asarray(routed - routed[-1])).max(1) > 0
    )  # the last has no room on any chip, only its shared expert
    return np.flatnonzero(kept).tolist(), aux.load.dropped_per_expert.tolist()


@pytest.mark.slow
def test_a_mesh_drops_what_one_chip_drops():
    """The expert has room for two of the batch's sixteen, ⌈1 · 16 · 1 / 8⌉, wherever they lie."""
    alone = all_for_expert_3()
    assert alone == ([0, 1], [0, 0, 0, 14, 0, 0, 0, 0])
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        assert all_for_expert_3() == alone


@pytest.mark.slow
def test_what_chips_drop_by_themselves_is_counted_over_all():
    """Each of four chips has four tokens for one expert and room for one, ⌈1 · 4 · 1 / 8⌉."""
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        kept, dropped = all_for_expert_3(capacity_of="chip")
    assert kept == [0, 4, 8, 12]
    assert dropped == [0, 0, 0, 12, 0, 0, 0, 0]


def test_a_mesh_that_does_not_divide_the_experts():
    with jax.set_mesh(make_mesh(ep=3)), pytest.raises(ValueError, match="num_experts=8 is not divisible by ep=3"):
        new_layer("softmax")


@pytest.mark.slow
def test_sums_over_experts_that_choose_are_over_all_chips():
    """Tokens lie over chips by their positions, so that a chip's are not one run of the batch; most are left out."""
    layer = new_layer("expert_choice", np.random.default_rng(0))
    layer.config = dataclasses.replace(
        layer.config, router=dataclasses.replace(layer.config.router, capacity_factor=0.25)
    )
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 16)), jnp.float32)
    _, alone = inference(layer, x)
    layer.mesh = mesh_of(AxisType.Auto)
    layer.partition = Partition(tokens=((), ("data", "expert")))
    _, spread = inference(layer, x)
    assert same_bits((spread.load, spread.topk_ids), (alone.load, alone.topk_ids))
    assert int(alone.load.unrouted) > 0


@pytest.mark.slow
def test_the_loss_of_a_specialized_router_is_of_all_chips():
    layer = new_layer("specialized", np.random.default_rng(0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 16)), jnp.float32)
    _, alone = inference(layer, x)
    layer.mesh = mesh_of(AxisType.Auto)
    _, spread = inference(layer, x)
    np.testing.assert_allclose(spread.losses["specialization"], alone.losses["specialization"], rtol=1e-5)

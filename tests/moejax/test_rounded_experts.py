"""Weights that are rounded once for several passes: the bits of a layer that rounds them itself, and no more work."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import moejax.linen
from moejax import (
    MoE,
    MoEConfig,
    Partition,
    QTensor,
    Quantization,
    moe,
    place,
    quantize_for_training,
    quantize_params,
)
from moejax.models import AttentionConfig, BlockConfig, DecoderBlock, MLPConfig
from tests.helpers import mesh_of, normal, raises_saying, relative_error, same_bits
from tests.moejax.layers import random_params
from tests.moejax.test_meshes import equations

ALL_IN_8_BITS = Quantization(gradient_dtype="float8_e4m3fn", weights_gradient_dtype="float8_e4m3fn")
CONFIG = MoEConfig(512, 256, 8, 2, precision="w8a8", quantization=ALL_IN_8_BITS, shared_intermediate_size=256)
IN_16_BITS_BACK = dataclasses.replace(CONFIG, quantization=Quantization(dtype="float8_e5m2"))


def gradients(config, mesh=None, **checkpoint):
    """(params, x, rounded) -> the loss, and the gradients of the first two."""

    def loss(params, x, rounded):
        y, aux = moe(x, params, config, rounded=rounded, mesh=mesh)
        return jnp.square(y.astype(jnp.float32)).sum() + aux.loss

    return jax.value_and_grad(jax.checkpoint(loss, **checkpoint) if checkpoint else loss, argnums=(0, 1))


@pytest.mark.parametrize("config", [CONFIG, IN_16_BITS_BACK], ids=["all in 8 bits", "forward in 8 bits"])
@pytest.mark.parametrize(
    "axes",
    [{}, {"expert": 4}, {"fsdp": 2, "expert": 2}, {"tensor": 2, "expert": 2}, {"data": 2, "expert": 2}],
    ids=lambda axes: "x".join(axes) or "one chip",
)
@pytest.mark.quick("one chip-all*", "fsdp*-all*")
def test_the_layer_is_the_same(rng, axes, config):
    kind = AxisType.Explicit if "data" in axes else AxisType.Auto
    mesh = mesh_of(kind, **axes) if axes else None
    params, x = random_params(config, rng), normal(rng, 4, 16, 512, dtype="bfloat16")
    run = jax.jit(gradients(config, mesh))
    rounded = jax.jit(functools.partial(quantize_for_training, config=config, mesh=mesh))(params)
    assert same_bits(run(params, x, rounded), run(params, x, None))


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(),
        Quantization(gradient_dtype="float8_e4m3fn"),
        Quantization(lhs_scaling="per_row", rhs_scaling="per_channel"),
        Quantization(dtype="int8"),
    ],
    ids=["forward", "and back", "by channel", "int8"],
)
@pytest.mark.quick("forward", "and back", "by channel")
def test_an_fsdp_axis_gives_what_one_chip_gives(rng, quantization):
    """Whether chips round their parts or, where scales are others, what they have gathered."""
    config = dataclasses.replace(CONFIG, quantization=quantization, dtype=jnp.float32)
    params, x = random_params(config, rng), normal(rng, 4, 16, 512)
    found, expected = (jax.jit(gradients(config, mesh))(params, x, None) for mesh in (mesh_of(fsdp=2, expert=1), None))
    for part, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(part, whole) < 1e-5


def test_micro_batches_round_no_weights(rng):
    params, batches = random_params(CONFIG, rng), normal(rng, 2, 16, 512, dtype="bfloat16")

    def step(params, batches, rounded):
        def add(total, x):
            return jax.tree.map(jnp.add, total, gradients(CONFIG)(params, x, rounded)[1][0]), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]

    rounded = quantize_for_training(params, CONFIG)
    for given, count in ((rounded, 0), (None, 4)):
        traced = jax.make_jaxpr(step)(params, batches, given).jaxpr
        assert len(equations(traced, "quantize_transpose")) == count
    assert same_bits(jax.jit(step)(params, batches, rounded), jax.jit(step)(params, batches, None))


def test_what_is_repeated_in_the_backward_pass_rounds_no_weights_either(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 16, 512, dtype="bfloat16")
    rounded = quantize_for_training(params, CONFIG)
    again = gradients(CONFIG, policy=jax.checkpoint_policies.nothing_saveable)
    assert not equations(jax.make_jaxpr(again)(params, x, rounded).jaxpr, "quantize_transpose")
    assert same_bits(jax.jit(again)(params, x, rounded), jax.jit(again)(params, x, None))


def test_an_fsdp_axis_gathers_8_bits(rng):
    """Of matrices; nothing of the arrays, whose gradients are scattered."""
    mesh, params = mesh_of(fsdp=2, expert=1), random_params(CONFIG, rng)
    x, rounded = normal(rng, 16, 512, dtype="bfloat16"), quantize_for_training(params, CONFIG, mesh=mesh)
    compiled = jax.jit(gradients(CONFIG, mesh)).lower(params, x, rounded).compile().as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled)
    matrices = [dtype for dtype, sizes in gathered if math.prod(map(int, sizes.split(","))) >= 256 * 256]
    assert len(matrices) >= 4
    assert set(matrices) <= {"u8", "f8e4m3fn"}


def test_blocks_and_linen_modules_hand_it_on(rng):
    x = normal(rng, 2, 8, 512, dtype="bfloat16")
    block = DecoderBlock(BlockConfig(AttentionConfig(512, 2, 2, 128), CONFIG), rngs=nnx.Rngs(0))
    call = nnx.jit(lambda block, x, rounded: block(x, rounded=rounded)[0])
    assert same_bits(call(block, x, block.quantized_for_training()), call(block, x, None))
    others = MoE(CONFIG, rngs=nnx.Rngs(1)).quantized_for_training()
    assert relative_error(call(block, x, others), call(block, x, None)) > 0.1

    dense = DecoderBlock(BlockConfig(AttentionConfig(512, 2, 2, 128), MLPConfig(512, 256)), rngs=nnx.Rngs(0))
    assert dense.quantized_for_training() is None
    with raises_saying(ValueError, "rounded must be None for a dense network", "got 'RoundedExperts'"):
        dense(x, rounded=others)

    module, layer = moejax.linen.MoE(CONFIG), MoE(CONFIG, rngs=nnx.Rngs(0))
    variables, rounded = jax.jit(module.init)(jax.random.key(0), x), layer.quantized_for_training()
    (plain, _), (other, _) = (jax.jit(module.apply)(variables, x, rounded=given) for given in (None, rounded))
    assert relative_error(other, plain) > 0.1  # those of other parameters are what it multiplies


def test_a_chip_rounds_its_part(rng):
    params = random_params(CONFIG, rng)
    mesh = mesh_of(fsdp=2, tensor=2, expert=2)
    spread = quantize_for_training(params, CONFIG, mesh=mesh)
    assert same_bits(spread, quantize_for_training(params, CONFIG))
    partition = Partition(expert="a", embed="b", tokens=("a", "b"))
    layer = MoE(CONFIG, rngs=nnx.Rngs(0), mesh=mesh_of(a=1, b=8), partition=partition)
    with raises_saying(ValueError, "sizes on each chip", "got float32[8, 64, 2, 256]"):  # the layer's mesh splits H
        layer.quantized_for_training()


def test_a_placed_layer_has_them_in_its_slots(rng):
    params, x, mesh = random_params(CONFIG, rng), normal(rng, 18, 512, dtype="bfloat16"), mesh_of(expert=3)
    params = place(params, jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1, 1], jnp.int32))
    rounded = quantize_for_training(params, CONFIG, mesh=mesh)
    call = jax.jit(lambda params, rounded: moe(x, params, CONFIG, rounded=rounded, mesh=mesh)[0])
    assert same_bits(call(params, rounded), call(params, None))


@pytest.mark.parametrize("ep", [1, 2])
def test_gradients_of_tokens_take_the_other_layout(rng, ep):
    config = dataclasses.replace(CONFIG, shared_intermediate_size=0)
    params, x, mesh = random_params(config, rng), normal(rng, 16, 512, dtype="bfloat16"), mesh_of(expert=ep)
    rounded = quantize_for_training(params, config)
    run = jax.jit(gradients(config, mesh))
    doubled = {
        name: (k_major, QTensor(n_last.values, 2 * n_last.scale))
        for name, (k_major, n_last) in (("gate_up", rounded.gate_up), ("down", rounded.down))
    }
    poisoned = dataclasses.replace(rounded, **doubled)
    (_, (of_params, _)), (_, (others, _)) = run(params, x, rounded), run(params, x, poisoned)
    assert relative_error(others.gate_up, 2 * of_params.gate_up) < 0.1  # what comes back through down
    assert same_bits(others.down, of_params.down)


def test_what_does_not_fit_is_named(rng):
    params, x = random_params(CONFIG, rng), normal(rng, 4, 512)
    rounded = quantize_for_training(params, CONFIG)
    with raises_saying(TypeError, "rounded must be RoundedExperts, of quantize_for_training, got dict"):
        moe(x, params, CONFIG, rounded={})
    made = "rounded.down must be what quantize_for_training(params, config) makes of params.down"
    with raises_saying(ValueError, made, "float8_e4m3fn[8, 512, 256]", "got (QTensor(values=float8_e4m3fn[8, 2,"):
        moe(x, params, CONFIG, rounded=dataclasses.replace(rounded, down=rounded.gate_up))
    with raises_saying(ValueError, made, "got (None, QTensor"):
        moe(x, params, CONFIG, rounded=dataclasses.replace(rounded, down=(None, rounded.down[1])))
    with raises_saying(ValueError, "rounded.shared_gate_up must be None, as params.shared_gate_up is"):
        alone = dataclasses.replace(CONFIG, shared_intermediate_size=0)
        moe(x, random_params(alone, rng), alone, rounded=rounded)
    in_e5m2 = quantize_for_training(params, dataclasses.replace(CONFIG, quantization=Quantization(dtype="float8_e5m2")))
    with raises_saying(
        ValueError, "rounded.gate_up must be what", "float8_e4m3fn[8, 2, 256, 512]", "got (QTensor(values=float8_e5m2"
    ):
        moe(x, params, CONFIG, rounded=in_e5m2)
    with raises_saying(ValueError, "params.gate_up must be an array where rounded is given, got a QTensor"):
        moe(x, quantize_params(params, CONFIG), CONFIG, rounded=rounded)
    with raises_saying(ValueError, "scales of params.gate_up=4 is not divisible by the 8 chips"):
        moe(x, params, CONFIG, rounded=rounded, mesh=mesh_of(fsdp=8, expert=1))
    with raises_saying(ValueError, "config.precision must be 'w8a8' for rounded weights, got 'w16a16'"):
        moe(x, params, dataclasses.replace(CONFIG, precision="w16a16", quantization=Quantization()), rounded=rounded)
    with raises_saying(ValueError, "params.gate_up must be an array, got a QTensor, which is not trained"):
        quantize_for_training(quantize_params(params, CONFIG), CONFIG)
    with raises_saying(TypeError, "params must be MoEParams, got MoE; of a layer, layer.params()"):
        quantize_for_training(MoE(CONFIG, rngs=nnx.Rngs(0)), CONFIG)
    by_channel = Quantization(lhs_scaling="per_row", rhs_scaling="per_channel")
    for quantization in (by_channel, Quantization(dtype="int8")):
        other = dataclasses.replace(CONFIG, quantization=quantization)
        with raises_saying(
            ValueError, "must be of FP8 with rhs_scaling='128x128'", quantization.dtype, "leave rounded="
        ):
            quantize_for_training(params, other)
    with raises_saying(ValueError, "multiples of 128", "got float32[8, 64, 2, 256]; leave rounded= out"):
        quantize_for_training(params, CONFIG, mesh=mesh_of(fsdp=8, expert=1))

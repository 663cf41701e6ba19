"""Experts in training, as one operator: against every expert on every token, forward, backward and twice."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import gated_halves
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import Quantization
from pallas_kernels.quantize_rows import rounded
from pallas_kernels.trained_mlp import Settings, pullback, trained_mlp
from tests.helpers import normal, raises_saying, relative_error, same_bits

T, K, E, H, WIDTH = 96, 2, 4, 128, 128
NAMES = ("x", "weights", "gate_up", "down", "bias")
FP8 = "float8_e4m3fn"
# The second is chosen twice by a token, the last by none, and some choices are not made.
TOPK_IDS = np.array([[0, 1], [1, 1], [-1, 2], [0, -1], [-1, -1], *([[2, 0]] * (T - 5))], np.int32)


def operands(rng, dtype="float32"):
    shapes = (T, H), (T, K), (E, H, 2 * WIDTH), (E, WIDTH, H), (E, 2 * WIDTH)
    values = [normal(rng, *shape) * shape[-2 if len(shape) == 3 else 0] ** -0.5 for shape in shapes]
    x, weights, gate_up, down, bias = values
    return x.astype(dtype) * 4, weights, gate_up.astype(dtype), down.astype(dtype), bias


def ours(x, weights, gate_up, down, bias, *, quantization=None, k_major=(False, False)):
    plan = make_plan(jnp.asarray(TOPK_IDS), E)
    choices = jnp.where(plan.order < 0, weights.size, plan.order)
    row_weights = weights.reshape(-1).at[choices].get(mode="fill", fill_value=0)
    dtype, tokens = x.dtype, x
    if quantization is not None:
        tokens = rounded(x, quantization.dtype, scaling="1x128", backend="auto")
    gate_up, down = (w.mT if is_k_major else w for w, is_k_major in zip((gate_up, down), k_major, strict=True))
    return trained_mlp(
        tokens,
        row_weights,
        plan,
        gate_up,
        down,
        gate_up_bias=bias,
        settings=Settings("silu", None, quantization, k_major, dtype),
        preferred_element_type=jnp.float32,
    )


def plain(x, weights, gate_up, down, bias):
    """Every expert on every token, in float32."""
    share = jnp.where(TOPK_IDS[:, :, None] == jnp.arange(E), weights[:, :, None], 0).sum(1)
    dot = functools.partial(jnp.einsum, precision="highest")
    x, gate_up, down = (a.astype(jnp.float32) for a in (x, gate_up, down))
    h = gated_halves(dot("th,ehj->tej", x, gate_up) + (0 if bias is None else bias), "silu")
    return dot("te,tei,eih->th", share, h, down)


def derivatives(function, primals, moving, directions, dy):
    """The value, its tangent, the gradients, and the tangents of these, for the operands of these numbers."""

    def of_moving(*moved):
        merged = list(primals)
        for i, value in zip(moving, moved, strict=True):
            merged[i] = value
        return function(*merged)

    def gradient(*moved):
        y, pull = jax.vjp(of_moving, *moved)
        return pull(dy * jnp.cos(y))

    at, along = ([values[i] for i in moving] for values in (primals, directions))
    return jax.jit(lambda: (jax.jvp(of_moving, at, along), jax.jvp(gradient, at, along)))()


SUBSETS = [c for n in (1, 5) for c in itertools.combinations(range(5), n)] + [(0, 1, 2, 3), (2, 3), (1, 4)]


@pytest.mark.parametrize("moving", SUBSETS, ids=lambda m: "+".join(NAMES[i] for i in m))
@pytest.mark.quick("x+weights+gate_up+down+bias", "weights", "down")
def test_derivatives_of_any_operands(rng, moving):
    primals, directions, dy = operands(rng), operands(rng), normal(rng, T, H)
    if 4 not in moving:
        primals = (*primals[:4], None)
    got, expected = (derivatives(f, primals, moving, directions, dy) for f in (ours, plain))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 2e-5


@pytest.mark.parametrize("k_major", [(True, False), (False, True)])
@pytest.mark.quick("k_major0")
def test_either_layout_of_weights(rng, k_major):
    primals, dy = operands(rng), normal(rng, T, H)
    gradients = [
        jax.jit(lambda f=f: jax.vjp(f, *primals)[1](dy))() for f in (ours, functools.partial(ours, k_major=k_major))
    ]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-6


QUANTIZATIONS = {
    "": Quantization(),
    "dx": Quantization(gradient_dtype=FP8),
    "dw": Quantization(weights_gradient_dtype="float8_e5m2"),
    "dx+dw": Quantization(gradient_dtype=FP8, weights_gradient_dtype=FP8),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.quick("dx+dw-bias")
def test_gradients_in_8_bits(rng, name, bias):
    x, weights, gate_up, down, b = operands(rng, "bfloat16")
    primals, dy = (x, weights, gate_up, down, b if bias else None), normal(rng, T, H)
    y, pull = jax.jit(lambda: jax.vjp(functools.partial(ours, quantization=QUANTIZATIONS[name]), *primals))()
    right, right_pull = jax.vjp(plain, *primals)
    assert relative_error(y, right) < 8e-2
    # The gradient of a row's weight is a product of two rows that are themselves products of rounded numbers.
    limits = {"weights": 0.1} | dict.fromkeys(("gate_up", "down", "bias"), 0.12 if name == "dw" else 8e-2)
    for operand, one, other in zip(NAMES, pull(dy), right_pull(dy), strict=True):
        if one is not None:
            assert one.dtype == other.dtype
            assert relative_error(one, other) < limits.get(operand, 8e-2), operand


def test_gradients_of_weights_do_not_depend_on_what_else_takes_one(rng):
    primals, dy = operands(rng, "bfloat16")[:4], normal(rng, T, H)

    def gradients(*moving):
        def of_moving(*moved):
            merged = list(primals)
            for i, value in zip(moving, moved, strict=True):
                merged[i] = value
            return ours(*merged, None, quantization=QUANTIZATIONS["dx+dw"])

        return jax.jit(lambda: jax.vjp(of_moving, *(primals[i] for i in moving))[1](dy))()

    of_all = gradients(0, 1, 2, 3)
    assert same_bits(gradients(2, 3), of_all[2:])
    assert same_bits(gradients(2), of_all[2:3])


def test_every_factor_is_rounded_to_its_own_dtype(rng, monkeypatch):
    """Activations to one, cotangents of rows to another, those for gradients of weights to a third."""
    found = collections.Counter()

    def spied(name, function):
        def run(*args, **options):
            found[name, jnp.dtype(options.get("dtype", args[1] if len(args) > 1 else None)).name] += 1
            return function(*args, **options)

        return run

    for name in ("rows_in_8_bits", "quantize_columns"):
        monkeypatch.setattr(pullback, name, spied(name, getattr(pullback, name)))
    quantization = Quantization(gradient_dtype="float8_e5m2", weights_gradient_dtype="int8")
    primals = operands(rng, "bfloat16")
    jax.make_jaxpr(lambda: jax.vjp(functools.partial(ours, quantization=quantization), *primals)[1](jnp.ones((T, H))))()
    # dy by tokens; x and h, then dy and the cotangent of pre-activations, by columns.
    expected = {("rows_in_8_bits", "float8_e5m2"): 1, ("quantize_columns", FP8): 2, ("quantize_columns", "int8"): 2}
    assert found == expected


def test_what_is_kept_for_the_gradient(rng):
    """Nothing of [R, H]: tokens, the plan, and the first product, which `jax.checkpoint` knows by name."""
    primals = operands(rng, "bfloat16")
    for quantization in (None, *QUANTIZATIONS.values()):
        _, pull = jax.eval_shape(lambda q=quantization: jax.vjp(functools.partial(ours, quantization=q), *primals))
        rows = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (T * K,) and leaf.size > T * K]
        assert rows == [(T * K, 2 * WIDTH)]


def test_no_second_derivatives_with_gradients_of_weights_in_8_bits(rng):
    primals, dy = operands(rng, "bfloat16"), normal(rng, T, H)
    function = functools.partial(ours, quantization=QUANTIZATIONS["dx+dw"])
    with raises_saying(TypeError, "cannot be differentiated"):
        jax.jvp(lambda x: jax.vjp(function, x, *primals[1:])[1](dy)[2], (primals[0],), (primals[0],))

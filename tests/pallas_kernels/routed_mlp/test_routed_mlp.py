"""The experts of a few tokens, against float64; what fits no tile, what is no choice, and what is NaN."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import gated_halves
from pallas_kernels.quantize import QTensor, ToRound, dequantize, quantize
from pallas_kernels.routed_mlp import routed_mlp
from tests.helpers import float64, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend

backend = every_backend("routed_mlp")

# An activation that lies between two numbers of 8 bits is rounded to the one or the other as sums differ in their last
# bits, and is then off by its last place.
TOLERANCE = 1.5e-2
SCALINGS = {"blocks": ("1x128", "128x128"), "rows": ("per_row", "per_channel")}


def make(
    rng, tokens: int, top_k: int, *, hidden=256, width=256, experts=6, scales="blocks", bias=False, residual=None
) -> dict[str, Any]:
    """Operands of random choices, one in seven of which is none: −1, or whatever else is no expert."""
    of_rows, of_weights = SCALINGS[scales]
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    ids = np.where(rng.random(ids.shape) < 1 / 7, rng.choice([-1, -5, experts, 2**31 - 1], ids.shape), ids)
    return {
        "x": quantize(normal(rng, tokens, hidden), scaling=of_rows),
        "topk_weights": jnp.asarray(rng.random(ids.shape), jnp.float32),
        "topk_ids": jnp.asarray(ids, jnp.int32),
        "gate_up": quantize(normal(rng, experts, hidden, 2 * width) / hidden**0.5, scaling=of_weights).mT,
        "down": quantize(normal(rng, experts, width, hidden) / width**0.5, scaling=of_weights).mT,
        "gate_up_bias": normal(rng, experts, 2 * width, dtype="bfloat16") if bias else None,
        "down_bias": normal(rng, experts, hidden, dtype="bfloat16") if bias else None,
        "residual": None if residual is None else normal(rng, tokens, hidden, dtype=residual),
    }


def expected(operands: dict[str, Any], scales: str = "blocks", **activation: Any) -> np.ndarray:
    """The sums in float64, but for the rounding between the products, which is what it is."""
    x, gate_up, down = (float64(dequantize(operands[name])) for name in ("x", "gate_up", "down"))
    y = np.zeros(x.shape) if operands["residual"] is None else float64(operands["residual"])
    for token, choices in enumerate(np.asarray(operands["topk_ids"])):
        for choice, expert in enumerate(choices):
            if not 0 <= expert < len(down):
                continue
            h = gate_up[expert] @ x[token]
            if operands["gate_up_bias"] is not None:
                h = h + float64(operands["gate_up_bias"][expert])
            h = gated_halves(
                jnp.asarray(h, jnp.float32), activation.get("activation", "silu"), activation.get("activation_limit")
            )
            out = down[expert] @ float64(dequantize(quantize(h[None], scaling=SCALINGS[scales][0])))[0]
            if operands["down_bias"] is not None:
                out = out + float64(operands["down_bias"][expert])
            y[token] += float(operands["topk_weights"][token, choice]) * out
    return y


def run(operands: dict[str, Any], backend: str, **options: Any) -> jax.Array:
    function = functools.partial(routed_mlp, backend=backend, **options)
    return jax.jit(lambda operands: function(**operands))(operands)


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (3, 2), (8, 5)])
@pytest.mark.parametrize("scales", SCALINGS)
@pytest.mark.quick("xla-blocks-1-1", "xla-blocks-3-2", "xla-rows-8-5", "pallas_gpu*")
def test_equals_float64(tokens, top_k, scales, backend, rng):
    operands = make(rng, tokens, top_k, scales=scales)
    y = run(operands, backend, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert relative_error(y, expected(operands, scales)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.quick("*-bfloat16", "xla-*")
def test_onto_a_residual(dtype, backend, rng):
    operands = make(rng, 3, 2, residual=dtype)
    operands["topk_ids"] = operands["topk_ids"].at[1].set(-1)
    y = run(operands, backend, out_dtype=jnp.float32)
    assert relative_error(y, expected(operands)) < TOLERANCE
    np.testing.assert_array_equal(y[1], operands["residual"][1].astype("float32"))


def test_with_biases_and_sizes_that_fit_no_tile(backend, rng):
    operands = make(rng, 5, 3, hidden=144, width=208, scales="rows", bias=True)
    activation = {"activation": "swigluoai", "activation_limit": 1.0}
    y = run(operands, backend, **activation)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, expected(operands, "rows", **activation)) < TOLERANCE


@pytest.mark.parametrize("hidden", [256, 1024])
def test_tokens_that_are_to_be_rounded(backend, rng, hidden):
    operands, x = make(rng, 3, 2, hidden=hidden), normal(rng, 3, hidden, dtype="bfloat16")
    y = run(operands | {"x": ToRound(x, "float8_e4m3fn")}, backend)
    assert same_bits(y, run(operands | {"x": quantize(x, scaling="1x128")}, backend))
    gradient = jax.grad(lambda x: run(operands | {"x": ToRound(x, "float8_e4m3fn")}, backend).astype("float32").sum())
    assert not np.asarray(gradient(x)).any()


def test_without_any_choice(backend, rng):
    operands = make(rng, 4, 2) | {"topk_ids": jnp.full((4, 2), -1, jnp.int32)}
    assert not np.asarray(run(operands, backend)).any()


def test_without_any_token(backend, rng):
    operands = make(rng, 1, 2)
    x = QTensor(operands["x"].values[:0], operands["x"].scale[:0])
    none = {"x": x, "topk_ids": jnp.zeros((0, 2), jnp.int32), "topk_weights": jnp.zeros((0, 2))}
    assert run(operands | none, backend).shape == (0, 256)


def test_an_expert_chosen_twice_counts_twice(backend, rng):
    operands = make(rng, 2, 3) | {"topk_ids": jnp.asarray([[4, 1, 4], [1, 1, 1]], jnp.int32)}
    y = run(operands, backend, out_dtype=jnp.float32)
    assert relative_error(y, expected(operands)) < TOLERANCE


def test_a_token_of_nan_leaves_the_others_alone(backend, rng):
    operands = make(rng, 4, 2)
    operands["topk_ids"] = operands["topk_ids"].at[1].set(jnp.asarray([-1, 3]))
    broken = operands["x"].scale.at[1].set(jnp.nan)
    y = np.asarray(run(operands | {"x": QTensor(operands["x"].values, broken)}, backend, out_dtype=jnp.float32))
    others = [0, 2, 3]
    assert relative_error(y[others], expected(operands)[others]) < TOLERANCE
    assert np.isnan(y[1]).all()


def test_same_bits_again(backend, rng):
    operands = make(rng, 8, 4)
    first = np.asarray(run(operands, backend))
    assert all(np.array_equal(first, run(operands, backend)) for _ in range(3))


def test_errors(rng):
    operands = make(rng, 3, 2)
    with raises_saying(ValueError, "gate_up must be a QTensor of 3 dimensions", "float32[2]"):
        routed_mlp(**operands | {"gate_up": jnp.ones(2)})
    with raises_saying(ValueError, "out_dtype must be BF16, FP16 or float32, got int8"):
        routed_mlp(**operands, out_dtype="int8")
    with raises_saying(ValueError, "down must be", "[6, 256, 256]"):
        routed_mlp(**operands | {"down": operands["gate_up"]})
    with raises_saying(ValueError, "topk_ids must be int32"):
        routed_mlp(**operands | {"topk_ids": operands["topk_ids"].astype(jnp.float32)})
    with raises_saying(ValueError, "scale", "rows"):
        routed_mlp(**operands | {"x": quantize(normal(rng, 3, 256))})
    with raises_saying(ValueError, "activation"):
        routed_mlp(**operands, activation="swish")

"""A sum over a traced number of rounds against a Python loop, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.exchange.rounds import sum_over_rounds
from tests.helpers import normal, relative_error, same_bits

MOST = 4


def one_round(index, constants, args):
    x, (weights, scale_in_8_bits) = args["x"], args["weights"]
    shift = constants[index] + scale_in_8_bits.astype(jnp.float32)
    return jnp.sin((x.astype(jnp.float32) + shift) @ weights) * (index + 1)


def make_args(rng):
    x, weights = normal(rng, 3, 5, dtype=jnp.bfloat16), normal(rng, 5, 2)
    return jnp.arange(MOST, dtype=jnp.int32), {"x": x, "weights": (weights, jnp.ones(5, jnp.float8_e4m3fn))}


def in_rounds(count, constants, args):
    return sum_over_rounds(one_round, count, constants, args)


def unrolled(count, constants, args):
    return sum((one_round(r, constants, args) for r in range(count)), start=jnp.zeros((3, 2)))


def loss(function, direction):
    def of_trained(x, weights, count, constants, args):
        args = {"x": x, "weights": (weights, args["weights"][1])}
        return (function(count, constants, args) * direction).sum()

    return of_trained


@pytest.mark.parametrize("count", range(MOST + 1))
def test_values_and_gradients(count, rng):
    constants, args = make_args(rng)
    direction = normal(rng, 3, 2)
    assert relative_error(jax.jit(in_rounds)(count, constants, args), unrolled(count, constants, args)) < 1e-6

    trained = (args["x"], args["weights"][0])
    gradients = jax.jit(jax.grad(loss(in_rounds, direction), argnums=(0, 1)))(*trained, count, constants, args)
    expected = jax.grad(loss(unrolled, direction), argnums=(0, 1))(*trained, count, constants, args)
    for gradient, reference, limit in zip(gradients, expected, (1e-2, 1e-5), strict=True):
        assert gradient.dtype == reference.dtype
        assert relative_error(gradient, reference) < limit


@pytest.mark.parametrize("count", [0, 3])
def test_forward_mode_and_second_derivatives(count, rng):
    constants, args = make_args(rng)
    trained = args["x"].astype(jnp.float32), args["weights"][0]
    direction, along = normal(rng, 3, 2), (normal(rng, 3, 5), normal(rng, 5, 2))

    def hvps(function):
        of = loss(lambda *args: jnp.sin(function(*args)), direction)
        gradient = jax.grad(lambda *trained: of(*trained, count, constants, args), argnums=(0, 1))
        turned = jax.grad(lambda *x: sum((g * d).sum() for g, d in zip(gradient(*x), along, strict=True)), (0, 1))
        return (
            jax.jvp(lambda *trained: of(*trained, count, constants, args), trained, along),
            jax.jvp(gradient, trained, along)[1],
            turned(*trained),
        )

    got, expected = jax.jit(lambda: hvps(in_rounds))(), hvps(unrolled)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-5


def test_mapped_over_numbers_of_rounds(rng):
    constants, args = make_args(rng)
    counts = jnp.arange(MOST + 1)
    got = jax.jit(jax.vmap(lambda count: in_rounds(count, constants, args)))(counts)
    assert relative_error(got, jnp.stack([unrolled(count, constants, args) for count in range(MOST + 1)])) < 1e-6


def test_gradients_are_added_in_float32(rng):
    """In BF16, 256 + 1 is 256 again, however often 1 is added."""
    x = jnp.ones((), jnp.bfloat16)

    def loss(x):
        return sum_over_rounds(lambda r, c, x: x.astype(jnp.float32) * c[r], jnp.int32(MOST), constants, x)

    constants = jnp.array([256.0, 1.0, 1.0, 1.0])
    assert float(jax.jit(jax.grad(loss))(x)) == float(jnp.bfloat16(259))


def test_two_runs_give_the_same_bits(rng):
    constants, args = make_args(rng)
    run = jax.jit(in_rounds)
    assert same_bits(run(MOST, constants, args), run(MOST, constants, args))
    assert np.isfinite(run(MOST, constants, args)).all()

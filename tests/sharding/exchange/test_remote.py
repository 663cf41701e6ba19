"""The exchange by remote DMA, interpreted on virtual devices with races looked for: every load, and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.exchange.exact import Exact
from sharding.exchange.pick import TRANSPORTS
from sharding.exchange.wire import Wire
from tests.helpers import normal, relative_error
from tests.pallas_kernels.kernels_tpu import interpreted
from tests.sharding.exchange.exchanges import Problem, apply_experts, random_ids

EP4 = Problem(dp=1, ep=4, num_tokens=5, top_k=2, num_experts=8, transport="interpreted")
IN_ROUNDS = Problem(dp=1, ep=8, num_tokens=24, top_k=2, num_experts=8, transport="interpreted")
DP2_EP2 = Problem(dp=2, ep=2, num_tokens=6, top_k=2, num_experts=4, transport="interpreted")
EP32 = Problem(dp=1, ep=32, num_tokens=3, top_k=2, num_experts=64, transport="interpreted")


@pytest.fixture(params=["eager", "on_wait"])
def interpreted_transport(request, monkeypatch):
    """Copies are made at once, or as late as can be: either finds faults that the other does not."""
    monkeypatch.setitem(TRANSPORTS, "interpreted", Exact("pallas_tpu"))
    apply_experts.cache_clear()
    with interpreted(dma_execution_mode=request.param):
        yield
    apply_experts.cache_clear()


def loads(problem: Problem, rng) -> list[np.ndarray]:
    """All to one expert, one token, none, a silent chip, anything."""
    shape = problem.all_tokens, problem.top_k
    one_token = np.full(shape, -1, np.int32)
    one_token[problem.all_tokens // 2, 0] = problem.num_experts - 1
    return [
        np.full(shape, 1, np.int32),
        one_token,
        np.full(shape, -1, np.int32),
        random_ids(problem, rng, silent=(1,)),
        random_ids(problem, rng),
    ]


def plain(problem: Problem, x, weights, ids, factors):
    total = jnp.where(ids >= 0, weights * factors[ids], 0).sum(1)
    return x * total[:, None]


@pytest.mark.usefixtures("interpreted_transport")
@pytest.mark.parametrize("problem", [EP4, DP2_EP2, IN_ROUNDS, EP32], ids=str)
@pytest.mark.slow
def test_every_load(problem, rng):
    for ids in loads(problem, rng):
        x, factors = normal(rng, problem.all_tokens, problem.hidden), jnp.arange(1.0, problem.num_experts + 1)
        weights = normal(rng, *ids.shape)
        y, _ = apply_experts(problem)(x, weights, ids, factors)
        expected = plain(problem, x, weights, ids, factors)
        assert relative_error(y, expected) < 1e-6


@pytest.mark.usefixtures("interpreted_transport")
@pytest.mark.parametrize("wire", [None, Wire("int8", "per_row")], ids=["", "int8"])
@pytest.mark.parametrize("problem", [EP4, IN_ROUNDS], ids=str)
@pytest.mark.slow
def test_gradients(problem, wire, rng):
    problem = dataclasses.replace(problem, wire=wire)
    ids = random_ids(problem, rng, used=[0, 1])
    x, weights = normal(rng, problem.all_tokens, problem.hidden), normal(rng, *ids.shape)
    factors, direction = jnp.arange(1.0, problem.num_experts + 1), normal(rng, problem.all_tokens, problem.hidden)

    def loss(function):
        return lambda x, weights: (function(x, weights) * direction).sum()

    run = loss(lambda x, weights: apply_experts(problem)(x, weights, ids, factors)[0])
    expected = loss(lambda x, weights: plain(problem, x, weights, ids, factors))
    found = jax.jit(jax.grad(run, argnums=(0, 1)))(x, weights)
    dx, dweights = jax.grad(expected, argnums=(0, 1))(x, weights)
    assert relative_error(found[0], dx) < 1e-6
    assert relative_error(found[1], dweights) < (1e-6 if wire is None else 2e-2)

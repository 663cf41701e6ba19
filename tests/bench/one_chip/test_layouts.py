"""Every layout gives the same answer, an independent one, as long as nothing overflows; what overflows is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.one_chip.cases import Case
from bench.one_chip.layouts import LAYOUTS, Variant, block_plan
from bench.one_chip.variants import variants
from moejax import MoEConfig
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from sharding.exchange.capacity import expert_capacity
from tests.helpers import LIMIT, normal, relative_error

TOKENS, HIDDEN, WIDTH, EXPERTS, K = 40, 24, 16, 6, 2


def one(layout: str, block: int, capacity_factor: float = EXPERTS / K) -> Variant:
    """A layout by itself; without a capacity factor there is room for all tokens in every expert."""
    sizes = {"tokens": TOKENS, "experts": EXPERTS, "k": K, "hidden": HIDDEN, "intermediate": WIDTH}
    split = {"layouts": (layout,), "split": (layout,)}
    (variant,) = variants(Case("layer", **sizes, **split, block=block, capacity_factor=capacity_factor))
    return variant


def apply(variant, x, ids, weights, gate_up, down):
    config = MoEConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, top_k=K, dtype=x.dtype, param_dtype=x.dtype
    )

    @jax.jit
    def run(x, ids, weights, gate_up, down):
        plan = variant.plan(ids)
        h = variant.gate_up(dispatch(x, plan), plan, gate_up, config)
        return combine(variant.down(h, plan, down, config), plan, weights), plan

    return run(x, ids, weights, gate_up, down)


def dense(x, ids, weights, gate_up, down, kept):
    """One token and one choice at a time, in float64."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    y = np.zeros_like(x)
    for t, k in np.argwhere(kept):
        gate, up = np.einsum("h,hji->ji", x[t], gate_up[ids[t, k]])
        y[t] += weights[t, k] * ((gate / (1 + np.exp(-gate)) * up) @ down[ids[t, k]])
    return y


@pytest.fixture
def operands(rng):
    """A skewed choice: no token wants expert 3, most want expert 0."""
    ids = np.stack([rng.permutation([0, 1, 2, 4, 5])[:K] for _ in range(TOKENS)]).astype(np.int32)
    ids[: TOKENS // 2, 0] = 0
    ids[: TOKENS // 2, 1] = rng.choice([1, 2, 4, 5], TOKENS // 2)
    arrays = normal(rng, TOKENS, HIDDEN), ids, normal(rng, TOKENS, K)
    return *arrays, normal(rng, EXPERTS, HIDDEN, 2, WIDTH), normal(rng, EXPERTS, WIDTH, HIDDEN)


@pytest.mark.parametrize("block", [1, 8, 128])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.quick("block_sparse-1", "compact-128", "padded-8")
def test_all_layouts_give_the_right_answer_without_overflow(name, block, operands):
    y, plan = apply(one(name, block), *operands)
    assert relative_error(y, dense(*operands, np.ones((TOKENS, K), bool))) < LIMIT["float32"]
    assert int(plan.dropped) == 0
    assert (np.asarray(plan.inverse) >= 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_overflow_is_dropped_by_the_padded_layout_alone_and_counted(name, operands):
    capacity = expert_capacity(TOKENS, K, EXPERTS, 1.0)
    ids = operands[1]
    beyond = int(np.maximum(np.bincount(ids.ravel(), minlength=EXPERTS) - capacity, 0).sum())
    assert beyond > 0
    y, plan = apply(one(name, 8, capacity_factor=1.0), *operands)
    kept = np.asarray(plan.inverse) >= 0
    assert int(plan.dropped) == (~kept).sum() == (beyond if name == "padded" else 0)
    assert relative_error(y, dense(*operands, kept)) < LIMIT["float32"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_16_bits(name, operands):
    x, ids, weights, gate_up, down = operands
    x, gate_up, down = (a.astype(jnp.bfloat16) for a in (x, gate_up, down))
    y, _ = apply(one(name, 8), x, ids, weights, gate_up, down)
    assert relative_error(y, dense(x, ids, weights, gate_up, down, np.ones((TOKENS, K), bool))) < 2e-2


@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_blocks_have_rows_of_one_expert(block, rng):
    ids = rng.integers(-1, 5, size=(30, 3)).astype(np.int32)  # −1 makes no choice
    plan = jax.jit(functools.partial(block_plan, num_experts=5, block=block))(ids)
    order, inverse = np.asarray(plan.order), np.asarray(plan.inverse)
    sizes = np.array([(ids == e).sum() for e in range(5)])
    np.testing.assert_array_equal(plan.group_sizes, -(-sizes // block) * block)
    np.testing.assert_array_equal(plan.offsets, np.cumsum(plan.group_sizes) - plan.group_sizes)
    assert order.size % block == 0
    flat = ids.ravel()
    for blocks in order.reshape(-1, block):
        assert len({flat[a] for a in blocks if a >= 0}) <= 1
    # Every choice has its own row, of its expert, in the order of the tokens; all other rows have none.
    assert ((inverse >= 0) == (ids >= 0)).all()
    for assignment, row in enumerate(inverse.ravel()):
        if row >= 0:
            assert order[row] == assignment
            expert = flat[assignment]
            assert plan.offsets[expert] <= row < plan.offsets[expert] + sizes[expert]
    assert (order >= 0).sum() == sizes.sum()


@pytest.mark.parametrize("experts", [0, 4])
def test_the_worst_load_fits_its_blocks(experts):
    """All choices on one expert, or one on each and the rest on the last."""
    ids = np.zeros((9, 1), np.int32) if experts == 0 else np.minimum(np.arange(9), 3).astype(np.int32)[:, None]
    plan = block_plan(jnp.asarray(ids), 4, 8)
    assert int(plan.group_sizes.sum()) <= plan.order.size
    assert (np.sort(np.asarray(plan.order))[-9:] == np.arange(9)).all()


def test_capacity_is_rounded_up_and_never_nothing():
    assert expert_capacity(100, 2, 8, 1.0) == 25
    assert expert_capacity(100, 2, 8, 1.25) == 32
    assert expert_capacity(1, 1, 128, 1.0) == 1

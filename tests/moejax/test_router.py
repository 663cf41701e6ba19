"""Each preset's routing against its published code, written out in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import PRESETS, MoEConfig, TopKRouter, get_preset, route, with_changes
from moejax.routers import NoisyTopKRouter
from tests.helpers import normal, relative_error

HIDDEN = 32
NUM_TOKENS = 24
CLEAR = 1e-5  # a choice between scores closer than this may fall either way in float32

routed = functools.partial(jax.jit, static_argnums=2)(route)


def route_logits(logits, config, **given):
    return config.router.choose(logits, config, **given)


routed_logits = functools.partial(jax.jit, static_argnums=1)(route_logits)


def small(**changes) -> MoEConfig:
    return with_changes(MoEConfig(HIDDEN, intermediate_size=16, num_experts=8, top_k=2), **changes)


def best(values, count):
    """The places of the largest values, largest first, lower place first among equals; and how clear the choice is."""
    places = sorted(range(len(values)), key=lambda place: (-values[place], place))
    top = [values[place] for place in places[: count + 1]]
    return places[:count], min((a - b for a, b in itertools.pairwise(top)), default=np.inf)


def softmax(values):
    exponentials = np.exp(values - np.max(values))
    return exponentials / exponentials.sum()


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def softmax_then_renormalise(logits, _correction, top_k):
    """Mixtral (MixtralSparseMoeBlock) and Qwen3 (norm_topk_prob): softmax over all experts, top-k, divide by sum."""
    scores = softmax(logits)
    ids, margin = best(scores, top_k)
    return ids, scores[ids] / scores[ids].sum(), margin


def softmax_of_chosen(logits, _correction, top_k):
    """gpt-oss (GptOssTopKRouter): top-k of the logits, softmax over those alone."""
    ids, margin = best(logits, top_k)
    return ids, softmax(logits[ids]), margin


def sigmoid_in_groups(logits, correction, top_k, groups, kept, scaling):
    """DeepSeek-V3 (MoEGate, noaux_tc): groups ranked by their two best scores, all with the correction bias."""
    scores = sigmoid(logits)
    ranking = scores + correction
    size = len(logits) // groups
    group_scores = [np.sort(ranking[g * size : (g + 1) * size])[-2:].sum() for g in range(groups)]
    best_groups, group_margin = best(group_scores, kept)
    open_to_choice = [ranking[e] if e // size in best_groups else -np.inf for e in range(len(logits))]
    ids, margin = best(open_to_choice, top_k)
    weights = scores[ids] / (scores[ids].sum() + 1e-20) * scaling
    return ids, weights, min(margin, group_margin)


def sigmoid_of_chosen(logits, _correction, top_k):
    """Llama 4 (Llama4Router): top-k of the logits, the sigmoid of each."""
    ids, margin = best(logits, top_k)
    return ids, sigmoid(logits[ids]), margin


PUBLISHED = {
    "deepseek-v3": functools.partial(sigmoid_in_groups, top_k=8, groups=8, kept=4, scaling=2.5),
    "deepseek-v3.2": functools.partial(sigmoid_in_groups, top_k=8, groups=8, kept=4, scaling=2.5),
    "kimi-k2": functools.partial(sigmoid_in_groups, top_k=8, groups=1, kept=1, scaling=2.827),
    "mixtral-8x7b": functools.partial(softmax_then_renormalise, top_k=2),
    "qwen3-30b-a3b": functools.partial(softmax_then_renormalise, top_k=8),
    "qwen3-235b-a22b": functools.partial(softmax_then_renormalise, top_k=8),
    "gpt-oss-120b": functools.partial(softmax_of_chosen, top_k=4),
    "llama-4-maverick": functools.partial(sigmoid_of_chosen, top_k=1),
}


def test_every_preset_is_tested():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_routes_as_its_published_code(name, rng):
    config = get_preset(name, hidden_size=HIDDEN)
    x, kernel = normal(rng, NUM_TOKENS, HIDDEN), 0.3 * normal(rng, HIDDEN, config.num_experts)
    bias = normal(rng, config.num_experts) if config.router.router_bias else None
    correction = 0.1 * normal(rng, config.num_experts) if config.router.correction_bias else None
    routing = routed(x, kernel, config, bias=bias, correction_bias=correction)

    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    logits += 0 if bias is None else np.asarray(bias, np.float64)
    assert routing.logits.dtype == routing.scores.dtype == routing.topk_weights.dtype == jnp.float32
    assert routing.topk_ids.dtype == jnp.int32
    assert relative_error(routing.logits, logits) < 1e-6
    is_sigmoid = config.router.scoring == "sigmoid"
    expected_scores = sigmoid(logits) if is_sigmoid else np.stack([softmax(row) for row in logits])
    assert relative_error(routing.scores, expected_scores) < 1e-6

    correction = np.zeros(config.num_experts) if correction is None else np.asarray(correction, np.float64)
    clear = 0
    for token in range(NUM_TOKENS):
        ids, weights, margin = PUBLISHED[name](logits[token], correction)
        if margin > CLEAR:
            clear += 1
            assert routing.topk_ids[token].tolist() == ids
            np.testing.assert_allclose(routing.topk_weights[token], weights, rtol=1e-5)
    assert clear > NUM_TOKENS / 2


@pytest.mark.parametrize("top_k", [1, 3])
def test_softmax_without_renormalising_keeps_the_probabilities(top_k, rng):
    """Switch Transformer: the weight of the one expert is its probability, which carries the router's gradient."""
    config = small(top_k=top_k, normalize_topk=False)
    logits = normal(rng, 16, 8)
    routing = routed_logits(logits, config)
    for token, row in enumerate(np.asarray(logits, np.float64)):
        scores = softmax(row)
        ids, margin = best(scores, top_k)
        if margin > CLEAR:
            assert routing.topk_ids[token].tolist() == ids
            np.testing.assert_allclose(routing.topk_weights[token], scores[ids], rtol=1e-5)


def test_softmax_within_the_best_groups(rng):
    """DeepSeek-V2: groups are ranked by their best score, and the weights are of the softmax over all experts."""
    config = small(top_k=3, num_groups=4, topk_groups=2, group_score_k=1, normalize_topk=False)
    logits = normal(rng, 16, 8)
    routing = routed_logits(logits, config)
    for token, row in enumerate(np.asarray(logits, np.float64)):
        groups, _ = best(row.reshape(4, 2).max(1), 2)
        ids, _ = best(np.where(np.isin(np.arange(8) // 2, groups), row, -np.inf), 3)
        assert routing.topk_ids[token].tolist() == ids
        np.testing.assert_allclose(routing.topk_weights[token], softmax(row)[ids], rtol=1e-5)


def test_scaling_factor_multiplies_the_normalised_weights(rng):
    logits = normal(rng, 16, 8)
    plain, scaled = (routed_logits(logits, small(routed_scaling_factor=factor)) for factor in (1.0, 2.5))
    np.testing.assert_allclose(plain.topk_weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(scaled.topk_weights, 2.5 * plain.topk_weights, rtol=1e-6)


def test_square_root_of_softplus(rng):
    config = small(scoring="sqrt_softplus", correction_bias=True)
    logits, correction = normal(rng, 16, 8), normal(rng, 8)
    routing = routed_logits(logits, config, correction_bias=correction)
    scores = np.sqrt(np.log1p(np.exp(np.asarray(logits, np.float64))))
    assert relative_error(routing.scores, scores) < 1e-6
    for token, row in enumerate(scores):
        ids, margin = best(row + np.asarray(correction, np.float64), 2)
        if margin > CLEAR:
            assert routing.topk_ids[token].tolist() == ids
            np.testing.assert_allclose(routing.topk_weights[token], row[ids] / row[ids].sum(), rtol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
def test_among_equal_scores_the_lower_number_wins(scoring):
    config = small(scoring=scoring, top_k=3)
    rows = jnp.array([[0.0] * 8, [1, 2, 1, 2, 1, 2, 1, 2], [0, 0, 0, 0, 0, 0, 0, 1], [3, 1, 1, 1, 1, 1, 1, 1]])
    assert routed_logits(rows, config).topk_ids.tolist() == [[0, 1, 2], [1, 3, 5], [7, 0, 1], [0, 1, 2]]


def test_among_equal_groups_the_lower_number_wins():
    config = small(scoring="sigmoid", num_groups=4, topk_groups=2)
    rows = jnp.array([[0.0] * 8, [0, 0, 1, 0, 0, 1, 1, 0]])
    assert routed_logits(rows, config).topk_ids.tolist() == [[0, 1], [2, 5]]


def test_a_group_is_ranked_by_its_two_best_scores():
    """Group 0 has the best expert of all, groups 1 and 2 the best pairs."""
    config = small(scoring="sigmoid", num_experts=9, num_groups=3, topk_groups=2)
    rows = jnp.array([[3.0, -4, -4, 1, 1, -4, 1.5, 1.5, -4]])
    assert routed_logits(rows, config).topk_ids.tolist() == [[6, 7]]


def test_a_group_may_be_ranked_by_its_best_score():
    """DeepSeek-V2: the best expert of all brings its group in."""
    config = small(scoring="sigmoid", num_experts=9, num_groups=3, topk_groups=1, group_score_k=1)
    rows = jnp.array([[3.0, -4, -4, 1, 1, -4, 1.5, 1.5, -3]])
    assert routed_logits(rows, config).topk_ids.tolist() == [[0, 1]]


def test_groups_of_one_expert():
    config = small(scoring="sigmoid", num_groups=8, topk_groups=3)
    logits = jnp.array([[0.0, 5, 1, 4, 2, 3, -1, -2]])
    assert routed_logits(logits, config).topk_ids.tolist() == [[1, 3]]


ROUTERS = {
    "softmax": small(top_k=3),
    "sigmoid": small(top_k=3, scoring="sigmoid"),
    "groups": small(top_k=3, scoring="sigmoid", num_groups=4, topk_groups=2),
    "unnormalised": small(top_k=3, scoring="sigmoid", normalize_topk=False),
    "softplus": small(top_k=3, scoring="sqrt_softplus"),
}


def with_nan(rng):
    """Logits of five tokens; in 1 one is NaN, in 3 all are."""
    sound = normal(rng, 5, 8)
    return sound, sound.at[1, 6].set(jnp.nan).at[3].set(jnp.nan)


@pytest.mark.parametrize("router", ROUTERS)
def test_known_nan_logits_raise(router, rng):
    _, logits = with_nan(rng)
    with pytest.raises(ValueError, match=r"logits of 2 of 5 tokens are NaN \(first: token 1\).*layer's input.*kernel"):
        route_logits(logits, ROUTERS[router])


def test_a_nan_token_raises_through_route(rng):
    x = normal(rng, 4, HIDDEN).at[2, 5].set(jnp.inf).at[2, 6].set(-jnp.inf)
    with pytest.raises(ValueError, match=r"1 of 4 tokens are NaN \(first: token 2\)"):
        route(x, jnp.ones((HIDDEN, 8)), small())


@pytest.mark.parametrize("router", ROUTERS)
def test_under_jit_nan_stays_with_its_token(router, rng):
    config = ROUTERS[router]
    sound, logits = with_nan(rng)
    expected, routing = routed_logits(sound, config), routed_logits(logits, config)
    others = np.array([0, 2, 4])
    np.testing.assert_array_equal(routing.topk_ids[others], expected.topk_ids[others])
    np.testing.assert_array_equal(routing.topk_weights[others], expected.topk_weights[others])
    assert np.isnan(routing.topk_weights[np.array([1, 3])]).all()
    for ids in routing.topk_ids.tolist():
        assert len(set(ids)) == config.top_k
        assert all(0 <= e < config.num_experts for e in ids)


def test_a_nan_token_where_a_bias_ranks(rng):
    _, logits = with_nan(rng)
    config = small(scoring="sigmoid", correction_bias=True, num_groups=4, topk_groups=2)
    weights = routed_logits(logits, config, correction_bias=normal(rng, 8)).topk_weights
    np.testing.assert_array_equal(np.isnan(weights), [[False] * 2, [True] * 2, [False] * 2, [True] * 2, [False] * 2])


def test_logits_that_are_constants_under_jit(rng):
    sound, logits = with_nan(rng)
    expected = routed_logits(sound, small())
    assert jax.jit(lambda: route_logits(sound, small()))().topk_ids.tolist() == expected.topk_ids.tolist()
    with pytest.raises(ValueError, match="2 of 5 tokens are NaN"):
        jax.jit(lambda: route_logits(logits, small()))()


def test_underflowing_scores_give_no_nan():
    routing = routed_logits(jnp.full((1, 8), -200.0), small(scoring="sigmoid"))
    assert np.isfinite(routing.topk_weights).all()


def test_correction_bias_changes_the_choice_and_not_the_weights():
    config = small(scoring="sigmoid", normalize_topk=False, correction_bias=True)
    logits = jnp.array([[2.0, 1, 0, -1, -2, -3, -4, -5]])
    correction = jnp.zeros(8).at[7].set(10)
    routing = routed_logits(logits, config, correction_bias=correction)
    assert routing.topk_ids.tolist() == [[7, 0]]
    np.testing.assert_allclose(routing.topk_weights, sigmoid(np.array([[-5.0, 2.0]])), rtol=1e-6)


def test_correction_bias_takes_no_gradient(rng):
    config = small(scoring="sigmoid", correction_bias=True)
    logits, correction, direction = normal(rng, 6, 8), normal(rng, 8), normal(rng, 6, 2)

    def loss(logits, correction):
        routing = route_logits(logits, config, correction_bias=correction)
        return (routing.topk_weights * direction).sum() + routing.scores.sum()

    to_logits, to_correction = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, correction)
    assert not to_correction.any()
    assert to_logits.any()


def test_gradient_of_renormalised_softmax_is_that_of_a_softmax_over_the_chosen(rng):
    logits, direction = normal(rng, 16, 8), normal(rng, 16, 2)
    ids = routed_logits(logits, small()).topk_ids

    def ours(logits):
        return (route_logits(logits, small()).topk_weights * direction).sum()

    def theirs(logits):
        return (jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=1)) * direction).sum()

    assert relative_error(jax.jit(jax.grad(ours))(logits), jax.grad(theirs)(logits)) < 1e-5


def test_bf16_tokens_are_routed_in_float32(rng):
    x, kernel = normal(rng, NUM_TOKENS, HIDDEN, dtype=jnp.bfloat16), normal(rng, HIDDEN, 8, dtype=jnp.bfloat16)
    routing = routed(x, kernel, small())
    assert routing.logits.dtype == jnp.float32
    expected = np.asarray(x).astype(np.float64) @ np.asarray(kernel).astype(np.float64)
    assert relative_error(routing.logits, expected) < 1e-6


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape"),
    [((4,), (HIDDEN, 8)), ((2, 4, HIDDEN), (HIDDEN, 8)), ((4, HIDDEN + 1), (HIDDEN, 8)), ((4, HIDDEN), (HIDDEN, 9))],
)
def test_shapes_that_do_not_fit(x_shape, kernel_shape):
    with pytest.raises(ValueError, match=r"kernel \[H, E\] = \[32, 8\]") as error:
        route(jnp.zeros(x_shape), jnp.zeros(kernel_shape), small())
    assert f"x {list(x_shape)} and kernel {list(kernel_shape)}" in str(error.value)


@pytest.mark.parametrize("router", ROUTERS)
def test_choices_that_are_given_are_made_and_weighted_anew(router, rng):
    """Of another call's choices some are left free; those go to the best experts that are not chosen yet."""
    config = ROUTERS[router]
    given = np.asarray(routed_logits(normal(rng, 16, 8), config).topk_ids)
    given = np.where(rng.random(given.shape) < 0.3, -1, given).astype(np.int32)
    logits = normal(rng, 16, 8)
    routing = routed_logits(logits, config, topk_ids=jnp.asarray(given))
    free = routed_logits(logits, config)
    np.testing.assert_array_equal(np.where(given < 0, -1, routing.topk_ids), given)
    scores = np.asarray(routing.scores, np.float64)
    for token, ids in enumerate(routing.topk_ids.tolist()):
        assert len(set(ids)) == config.top_k
        weights = scores[token, ids] / (scores[token, ids].sum() if config.router.normalize_topk else 1)
        np.testing.assert_allclose(routing.topk_weights[token], weights, rtol=1e-5)
        if (given[token] < 0).all():
            assert ids == free.topk_ids[token].tolist()


def test_the_free_choices_beside_given_ones():
    logits = jnp.array([[5.0, 4, 3, 2, 1, 0, -1, -2]] * 3)
    given = jnp.array([[7, -1, -1], [-1, 0, -1], [-1, -1, -1]], jnp.int32)
    routing = routed_logits(logits, small(top_k=3), topk_ids=given)
    assert routing.topk_ids.tolist() == [[7, 0, 1], [1, 0, 2], [0, 1, 2]]


def test_another_router_is_refused(rng):
    config = small(router=NoisyTopKRouter())
    with pytest.raises(ValueError, match="router must be a TopKRouter, got NoisyTopKRouter; call the layer"):
        route(normal(rng, 4, HIDDEN), jnp.zeros((HIDDEN, 8)), config)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.quick("softmax", "sqrt_softplus")
def test_scores_of_extreme_logits_have_finite_gradients(scoring):
    config = MoEConfig(4, 4, 4, 2, router=TopKRouter(scoring=scoring), dtype=jnp.float32)
    kernel = jnp.diag(jnp.array([1.0, -1.0, -200.0, 100.0]))

    def loss(x, kernel):
        return (route(x, kernel, config).topk_weights * jnp.array([1.0, -2.0])).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(jnp.ones((3, 4)), kernel):
        assert np.isfinite(gradient).all()

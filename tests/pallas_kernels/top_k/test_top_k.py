import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.top_k import (
    Groups,
    gpu,
    ranked_top_k,
    softmax_top_k,
    softmax_weights_at,
    top_k,
    top_k_ids,
    weights_at,
)
from pallas_kernels.top_k.gpu import few
from pallas_kernels.top_k.places import placed, taken
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda

backend = every_backend("top_k")

SHAPES = [(16384, 128, 2), (64, 128, 8), (1, 8, 2), (300, 256, 8), (257, 64, 64), (3, 512, 4), (70, 60, 4), (8, 128, 8)]


def sorted_ids(scores, k):
    """By a stable sort, so that the lower of equals comes first."""
    return np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_largest_first(backend, rng, tokens, experts, k):
    scores = normal(rng, tokens, experts)
    ids = jax.jit(lambda scores: top_k_ids(scores, k, backend=backend))(scores)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, sorted_ids(scores, k))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
@pytest.mark.quick(
    "xla-1-8-2-True",
    "xla-16384-128-2-False",
    "xla-257-64-64-True",
    "xla-3-512-4-True",
    "xla-300-256-8-False",
    "xla-64-128-8-False",
    "xla-70-60-4-False",
    "pallas_gpu*",
)
def test_weights_and_their_gradients(backend, rng, tokens, experts, k, normalize):
    scores = jax.nn.softmax(normal(rng, tokens, experts))
    cotangent = normal(rng, tokens, k)
    choose = jax.jit(lambda scores: top_k(scores, k, normalize=normalize, backend=backend))
    weights, ids = choose(scores)
    np.testing.assert_array_equal(ids, sorted_ids(scores, k))
    rows = np.arange(tokens)[:, None]
    chosen = np.asarray(scores, np.float64)[rows, ids]
    total = chosen.sum(1, keepdims=True)
    expected = chosen / total if normalize else chosen
    assert relative_error(weights, expected) < LIMIT["float32"]
    (gradient,) = jax.vjp(lambda scores: choose(scores).weights, scores)[1](cotangent)
    direction = np.asarray(cotangent, np.float64)
    if normalize:
        direction = (direction - (direction * expected).sum(1, keepdims=True)) / total
    dense = np.zeros(scores.shape)
    np.put_along_axis(dense, np.asarray(ids), direction, axis=1)
    assert relative_error(gradient, dense) < LIMIT["float32"]


@pytest.mark.parametrize("normalize", [False, True])
def test_nan_scores_have_nan_weights(backend, rng, normalize):
    scores = jax.nn.softmax(normal(rng, 100, 16)).at[7].set(jnp.nan)
    weights = np.asarray(top_k(scores, 3, normalize=normalize, backend=backend).weights)
    assert np.isnan(weights[7]).all()
    assert np.isfinite(np.delete(weights, 7, axis=0)).all()


def test_scores_that_underflow_have_no_weight(backend):
    weights = top_k(jnp.zeros((64, 8)), 2, normalize=True, backend=backend).weights
    np.testing.assert_array_equal(weights, np.zeros((64, 2)))


def test_lower_of_equals(backend, rng):
    scores = jnp.asarray(rng.integers(0, 3, (500, 32)), jnp.float32)
    np.testing.assert_array_equal(top_k_ids(scores, 8, backend=backend), sorted_ids(scores, 8))


def test_masked_and_nan_scores(backend, rng):
    scores = normal(rng, 270, 16).at[:, 4:].set(-jnp.inf).at[5, 2].set(jnp.nan)
    ids = np.asarray(top_k_ids(scores, 4, backend=backend))
    sound = np.arange(270) != 5
    np.testing.assert_array_equal(ids[sound], sorted_ids(scores, 4)[sound])
    assert ((ids >= 0) & (ids < 16)).all()


@pytest.mark.parametrize(("shape", "k", "message"), [((4,), 1, r"matrix \[T, E\]"), ((4, 8), 9, "1 to E = 8, got 9")])
def test_errors(shape, k, message):
    with pytest.raises(ValueError, match=message):
        top_k_ids(jnp.zeros(shape), k)


@pytest.mark.parametrize("k", [3, 8, 11])
@pytest.mark.quick("8", "11")
def test_on_a_simulated_gpu(rng, k):
    scores = jax.nn.softmax(normal(rng, 270, 24))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        weights, ids = jax.jit(lambda scores: top_k(scores, k, normalize=True, backend="pallas_gpu"))(scores)
        only_ids = jax.jit(lambda scores: top_k_ids(scores, k, backend="pallas_gpu"))(scores)
    np.testing.assert_array_equal(ids, sorted_ids(scores, k))
    np.testing.assert_array_equal(only_ids, ids)
    assert relative_error(weights, top_k(scores, k, normalize=True, backend="xla").weights) < LIMIT["float32"]


@pytest.mark.parametrize(("tokens", "experts", "k"), [s for s in SHAPES if s[0] >= 64 and s[1] % 8 == 0])
@pytest.mark.quick("300-256-8", "16384-128-2")
def test_lowers_for_cuda(tokens, experts, k):
    function = jax.jit(lambda scores: top_k(scores, k, normalize=True, backend="pallas_gpu"))
    scores = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    assert "mosaic_gpu" in function.trace(scores).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 128, 8), (5, 64, 10)])
def test_few_tokens_interpreted(rng, tokens, experts, k):
    """Whose rows take part of a tile; what is in the rest of it nobody has written."""
    scores = jax.nn.softmax(normal(rng, tokens, experts))
    with interpreted(), single_view(True):
        weights, ids = jax.jit(lambda scores: gpu.top_k(scores, k, normalize=True))(scores)
    np.testing.assert_array_equal(ids, sorted_ids(scores, k))
    chosen = np.take_along_axis(np.asarray(scores, np.float64), np.asarray(ids), axis=1)
    assert relative_error(weights, chosen / chosen.sum(1, keepdims=True)) < LIMIT["float32"]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
@pytest.mark.quick("xla-300-256-8-False", "xla-64-128-8-True", "xla-70-60-4-True", "pallas_gpu*")
def test_softmax_of_the_largest(backend, rng, tokens, experts, k, normalize):
    logits, cotangent = 4 * normal(rng, tokens, experts), normal(rng, tokens, k)
    choose = jax.jit(lambda logits: softmax_top_k(logits, k, normalize=normalize, backend=backend))
    weights, ids = choose(logits)
    np.testing.assert_array_equal(ids, sorted_ids(logits, k))

    def expected(logits):
        chosen = jnp.take_along_axis(jax.nn.softmax(logits), ids, axis=1)
        return chosen / chosen.sum(1, keepdims=True) if normalize else chosen

    right, right_pullback = jax.vjp(expected, logits)
    assert relative_error(weights, right) < LIMIT["float32"]
    (gradient,) = jax.vjp(lambda logits: choose(logits).weights, logits)[1](cotangent)
    expected_gradient = right_pullback(cotangent)[0]
    # Where one weight is almost all, what is left of the cotangent is what cancellation leaves.
    least = max(np.linalg.norm(expected_gradient), 0.1 * np.linalg.norm(cotangent))
    assert np.linalg.norm(gradient - expected_gradient) < LIMIT["float32"] * least


@pytest.mark.parametrize("normalize", [False, True])
def test_a_nan_that_is_not_chosen_is_seen_in_the_softmax(backend, rng, normalize):
    logits = normal(rng, 100, 16).at[:, 3:9].set(-jnp.inf).at[7, 5].set(jnp.nan)
    weights = np.asarray(softmax_top_k(logits, 3, normalize=normalize, backend=backend).weights)
    assert np.isnan(weights[7]).all()
    assert np.isfinite(np.delete(weights, 7, axis=0)).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_given_choices_see_a_nan_that_is_not_among_them(rng, normalize):
    logits = normal(rng, 2, 16).at[1, 5].set(jnp.nan)
    weights = softmax_weights_at(logits, jnp.array([[0, 5], [0, 6]], jnp.int32), normalize=normalize)
    np.testing.assert_array_equal(jnp.isnan(weights), [[False, False], [True, True]])


def test_a_gradient_of_normalised_weights_keeps_nothing_of_all_logits(rng):
    logits = normal(rng, 32, 64)
    _, pullback = jax.vjp(lambda logits: softmax_top_k(logits, 4, normalize=True).weights, logits)
    assert all(leaf.shape != logits.shape for leaf in jax.tree.leaves(pullback))


@pytest.mark.parametrize("k", [1, 3, 40])
def test_numbers_at_places_and_put_there(rng, k):
    """Few are compared with every column, many are scattered; what is put at one place twice adds up there."""
    x, numbers = normal(rng, 20, 64), normal(rng, 20, k)
    ids = jnp.asarray(rng.integers(0, 64, (20, k)), jnp.int32).at[:, -1].set(7).at[:, 0].set(7)
    expected = np.zeros(x.shape)
    np.add.at(expected, (np.arange(20)[:, None], np.asarray(ids)), np.asarray(numbers, np.float64))
    put = placed("auto", x=numbers, ids=ids, columns=64)
    assert relative_error(put, expected) < LIMIT["float32"]
    at, pullback = jax.vjp(lambda x: taken("auto", x=x, ids=ids, columns=64), x)
    np.testing.assert_array_equal(at, np.take_along_axis(np.asarray(x), np.asarray(ids), axis=1))
    np.testing.assert_array_equal(pullback(numbers)[0], put)


@pytest.mark.parametrize("normalize", [False, True])
def test_no_gradient_is_scattered(rng, normalize):
    logits, dweights = normal(rng, 64, 32), normal(rng, 64, 4)

    def gradient(logits):
        return jax.vjp(lambda logits: softmax_top_k(logits, 4, normalize=normalize).weights, logits)[1](dweights)

    assert "scatter" not in jax.jit(gradient).trace(logits).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(70, 24, 3), (2, 64, 10), (24, 128, 8), (2, 128, 4), (7, 32, 6)])
@pytest.mark.quick("70-24-3-False", "2-64-10-True", "24-128-8-*", "2-128-4-*", "7-32-6-True")
def test_the_softmax_interpreted(rng, tokens, experts, k, normalize):
    logits = normal(rng, tokens, experts).at[1, 5].set(jnp.nan).at[0, :8].set(-jnp.inf)
    # Of many tokens two blocks write some rows, both the same.
    with interpreted(detect_races=tokens < 64), single_view(True):
        weights, ids = jax.jit(lambda logits: gpu.softmax_top_k(logits, k, normalize=normalize))(logits)
    right = softmax_top_k(logits, k, normalize=normalize, backend="xla")
    sound = np.arange(tokens) != 1
    np.testing.assert_array_equal(ids[sound], right.ids[sound])
    assert relative_error(weights[sound], right.weights[sound]) < LIMIT["float32"]
    assert np.isnan(weights[1]).all()


@pytest.mark.parametrize(("tokens", "normalize"), [(70, False), (2, True)])
def test_no_expert_is_chosen_twice_where_few_logits_are_finite_interpreted(rng, tokens, normalize):
    logits = normal(rng, tokens, 64).at[:, 2:].set(-jnp.inf)
    with interpreted(detect_races=tokens < 64), single_view(True):
        weights, ids = jax.jit(lambda logits: gpu.softmax_top_k(logits, 4, normalize=normalize))(logits)
    right = softmax_top_k(logits, 4, normalize=normalize, backend="xla")
    np.testing.assert_array_equal(ids, right.ids)
    assert relative_error(weights, right.weights) < LIMIT["float32"]


@pytest.mark.parametrize("shape", [(8, 128), (70, 24)], ids=str)
def test_no_expert_is_chosen_twice_where_few_scores_are_finite_interpreted(rng, shape):
    """Of two finite ones, and of none."""
    scores, ranking = normal(rng, *shape), normal(rng, *shape).at[:, 2:].set(-jnp.inf).at[3].set(-jnp.inf)

    def choose(ranking):
        return top_k_ids(ranking, 4, backend="pallas_gpu"), gpu.ranked_top_k(
            scores, ranking, 4, groups=None, normalize=False
        )

    with interpreted(detect_races=shape[0] < 64), single_view(True):
        ids, (weights, ranked_ids) = jax.jit(choose)(ranking)
    right = sorted_ids(ranking, 4)
    np.testing.assert_array_equal(ids, right)
    np.testing.assert_array_equal(ranked_ids, right)
    np.testing.assert_array_equal(weights, np.take_along_axis(np.asarray(scores), right, axis=1))


GROUPS = [None, Groups(8, 4, 2), Groups(4, 1, 3), Groups(16, 5, 100), Groups(8, 8, 1)]


def ranked(rng, tokens, experts):
    """Scores, and a ranking of few different numbers: many are equal, most negative."""
    scores = jax.nn.sigmoid(normal(rng, tokens, experts))
    return scores, jnp.round(8 * (scores + 0.1 * normal(rng, experts))) / 8 - 1


def chosen_by_hand(ranking, k, groups):
    """The places of the best, token by token, the lower of equals first."""
    ids = []
    for row in np.asarray(ranking, np.float64):
        if groups is not None:
            parts = row.reshape(groups.num_groups, -1)
            best = np.sort(parts, axis=1)[:, ::-1][:, : groups.ranked_by].sum(1)
            kept = np.argsort(-best, kind="stable")[: groups.kept]
            row = np.where(np.isin(np.arange(groups.num_groups), kept)[:, None], parts, -np.inf).reshape(-1)
        ids.append(np.argsort(-row, kind="stable")[:k])
    return np.stack(ids)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", [(70, 256), (5, 64), (33, 160)], ids=str)
@pytest.mark.quick("xla-(70, 256)*", "xla-(5, 64)-None", "pallas_gpu*")
def test_scores_where_a_ranking_is_best(backend, rng, shape, groups):
    scores, ranking = ranked(rng, *shape)

    def weights_of(scores):
        return ranked_top_k(scores, ranking, 6, groups=groups, normalize=True, backend=backend)

    weights, ids = jax.jit(weights_of)(scores)
    right = chosen_by_hand(ranking, 6, groups)
    np.testing.assert_array_equal(ids, right)
    chosen = np.take_along_axis(float64(scores), right, axis=1)
    assert relative_error(weights, chosen / chosen.sum(1, keepdims=True)) < LIMIT["float32"]
    dweights = normal(rng, shape[0], 6)
    (found,) = jax.vjp(lambda scores: weights_of(scores).weights, scores)[1](dweights)
    (expected,) = jax.vjp(lambda scores: weights_at(scores, ids, normalize=True), scores)[1](dweights)
    assert relative_error(found, expected) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((19, 256), Groups(8, 4, 2)),
        ((16, 256), Groups(8, 1, 1)),
        ((8, 128), Groups(8, 3, 40)),
        ((20, 256), Groups(4, 2, 3)),
        ((24, 256), None),
        ((9, 32), None),
        ((70, 24), None),
        ((6, 160), Groups(8, 3, 2)),
        ((3, 256), Groups(8, 4, 2)),
        ((1, 256), Groups(8, 1, 1)),
        ((5, 64), Groups(8, 3, 2)),
        ((2, 128), Groups(1, 1, 2)),
    ],
    ids=str,
)
@pytest.mark.quick("(19,*", "(24, 256*", "(6,*", "(3,*", "(5,*", "(2,*")
def test_a_ranking_interpreted(rng, shape, groups):
    """Whole blocks and such that share rows, with groups in the kernel and before it."""
    scores, ranking = ranked(rng, *shape)
    with interpreted(detect_races=shape[0] % 8 == 0), single_view(True):
        weights, ids = jax.jit(lambda *x: gpu.ranked_top_k(*x, 4, groups=groups, normalize=False))(scores, ranking)
    np.testing.assert_array_equal(ids, chosen_by_hand(ranking, 4, groups))
    np.testing.assert_array_equal(weights, np.take_along_axis(np.asarray(scores), np.asarray(ids), axis=1))


@pytest.mark.parametrize(
    ("tokens", "experts", "is_taken"), [(2, 128, True), (7, 32, True), (1, 16, False), (3, 24, False), (8, 128, False)]
)
def test_which_rows_are_few(tokens, experts, is_taken):
    assert few.fits(jnp.zeros((tokens, experts))) == is_taken


@pytest.mark.parametrize(
    ("tokens", "experts", "num_groups", "is_taken"),
    [
        (7, 256, 8, True),
        (2, 256, 32, True),
        (3, 256, 32, False),  # more groups than a tile has rows
        (4, 64, 16, False),  # 4 experts a group: fewer than a tile has columns
        (8, 256, 8, False),  # a whole block
    ],
)
def test_which_rows_are_few_with_all_of_their_groups(tokens, experts, num_groups, is_taken):
    assert few.fits_groups(jnp.zeros((tokens, experts)), Groups(num_groups, 1, 1)) == is_taken


@pytest.mark.parametrize("tokens", [1, 7, 32, 200])
@pytest.mark.parametrize("experts", [8, 16, 32, 64, 128, 256])
def test_any_number_of_experts_and_tokens_lowers_for_cuda(tokens, experts):
    """Registers are laid out by both."""
    scores = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    for k in (4, 6):
        lower_for_cuda(lambda scores, k=k: top_k(scores, k, normalize=True, backend="pallas_gpu"), scores)


def test_groups_count_where_scores_have_16_bits_interpreted(rng):
    scores, ranking = ranked(rng, 8, 256)
    groups = Groups(8, 3, 2)
    with interpreted(), single_view(True):
        _, ids = jax.jit(lambda *x: gpu.ranked_top_k(*x, 4, groups=groups, normalize=False))(
            scores.astype(jnp.bfloat16), ranking
        )
    np.testing.assert_array_equal(ids, chosen_by_hand(ranking, 4, groups))


def test_of_its_best_groups_a_token_chooses_even_what_is_infinitely_bad(rng):
    scores, ranking = ranked(rng, 8, 256)
    ranking, groups = ranking.at[:, 66:].set(-jnp.inf).at[:, :64].set(-jnp.inf), Groups(8, 1, 2)
    ids = ranked_top_k(scores, ranking, 5, groups=groups, backend="xla").ids
    with interpreted(), single_view(True):
        _, in_kernel = jax.jit(lambda *x: gpu.ranked_top_k(*x, 5, groups=groups, normalize=False))(scores, ranking)
    np.testing.assert_array_equal(np.sort(ids, axis=1), [[64, 65, 66, 67, 68]] * 8)
    np.testing.assert_array_equal(in_kernel, ids)


def test_no_tokens_choose_from_groups():
    weights, ids = ranked_top_k(jnp.zeros((0, 64)), jnp.zeros((0, 64)), 4, groups=Groups(8, 2, 2))
    assert weights.shape == ids.shape == (0, 4)


def test_a_token_of_nan_gets_valid_places_interpreted(rng):
    scores, ranking = ranked(rng, 8, 256)
    ranking = ranking.at[3].set(jnp.nan)
    with interpreted(), single_view(True):
        _, ids = jax.jit(lambda *x: gpu.ranked_top_k(*x, 8, groups=Groups(8, 4, 2), normalize=True))(scores, ranking)
    assert ((np.asarray(ids) >= 0) & (np.asarray(ids) < 256)).all()
    others = np.arange(8) != 3
    np.testing.assert_array_equal(ids[others], chosen_by_hand(ranking[others], 8, Groups(8, 4, 2)))


@pytest.mark.parametrize(("tokens", "experts"), [(64, 256), (16384, 256), (8, 128)])
@pytest.mark.quick("64-256")
def test_a_ranking_lowers_for_cuda_without_a_sort(tokens, experts):
    x = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    choose = jax.jit(lambda *x: gpu.ranked_top_k(*x, 8, groups=Groups(8, 4, 2), normalize=True))
    text = choose.trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "chlo.top_k" not in text


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (Groups(7, 1, 1), ("num_groups", "divisor of E = 64", "7")),
        (Groups(8, 9, 1), ("kept", "1 to num_groups = 8", "9")),
        (Groups(8, 4, 0), ("ranked_by", "at least 1", "0")),
        (Groups(8, 1, 1), ("k must be at most the 8 experts of kept = 1 groups", "got 9")),
    ],
    ids=str,
)
def test_errors_of_groups(groups, words):
    with raises_saying(ValueError, *words):
        ranked_top_k(jnp.zeros((3, 64)), jnp.zeros((3, 64)), 9, groups=groups)


def test_a_ranking_of_another_shape_is_refused():
    with raises_saying(ValueError, "ranking must have the shape of scores, [3, 64]", "[3, 32]"):
        ranked_top_k(jnp.zeros((3, 64)), jnp.zeros((3, 32)), 2)

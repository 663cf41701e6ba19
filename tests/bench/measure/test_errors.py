"""Errors of results: by norm, the largest of a tree, over some rows; NaN never looks right."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.measure.errors import check, describe, largest_error, one_line, relative_error


def test_the_error_of_several_results_is_the_largest():
    right = (jnp.ones(4), jnp.ones((2, 2)))
    assert relative_error((jnp.ones(4), 1.25 * jnp.ones((2, 2), jnp.bfloat16)), right) == 0.25
    assert np.isnan(relative_error((jnp.ones(4).at[0].set(jnp.nan), jnp.ones((2, 2))), right))


def test_the_error_is_the_norm_of_the_difference_over_that_of_the_right_answer(rng):
    right, wrong = rng.standard_normal((2, 5, 3))
    expected = np.linalg.norm(wrong - right) / np.linalg.norm(right)
    assert relative_error(jnp.asarray(wrong), jnp.asarray(right)) == pytest.approx(expected, rel=1e-5)
    assert relative_error(jnp.zeros(3), jnp.zeros(3)) == 0


def test_rows_that_do_not_count():
    right = jnp.asarray([[3.0, 4.0], [2.0, 2.0]], jnp.float16)
    result = right.at[0, 1].add(0.5).at[1, 0].set(0)
    rows = jnp.asarray([True, False])
    assert relative_error(result, right, rows) == pytest.approx(0.1)
    assert largest_error(result, right, rows) == pytest.approx(0.125)
    assert largest_error(result, right) == 1.0
    assert largest_error(result.at[0, 0].set(jnp.nan), right, rows) == np.inf
    assert largest_error(result.at[1, 0].set(jnp.nan), right, rows) == pytest.approx(0.125)


@pytest.mark.parametrize("error", [0.03, float("nan")])
def test_what_exceeds_the_tolerance_is_wrong(error):
    check(0.02, 0.02)
    with pytest.raises(ValueError, match=f"wrong result: relative error {error:.1e}, limit 2e-02"):
        check(error, 0.02)


def test_an_error_in_one_line():
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line("x" * 20, 10) == "x" * 9 + "…"

"""Real text as the input of a layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.inputs.text import CONTEXT, default_text_path, embed, read_text, sample_contexts


def test_every_python_carries_the_default_text():
    text = read_text(default_text_path())
    assert text.size > 100_000
    assert b"statement" in text.tobytes()


def test_contexts_are_pieces_of_the_text():
    text = np.arange(40, dtype=np.uint8)
    contexts = sample_contexts(text, 500, seed=0)
    assert contexts.shape == (500, CONTEXT)
    assert (np.diff(contexts.astype(int), axis=1) == 1).all()
    assert contexts.min() == 0
    assert contexts.max() == 39
    np.testing.assert_array_equal(contexts, sample_contexts(text, 500, seed=0))


def test_a_token_is_told_apart_by_what_comes_before_it():
    same, other = np.zeros((2, CONTEXT), np.uint8)
    other = other.copy()
    other[-2] = 1
    x = embed(jnp.asarray(np.stack([same, same, other])), 64, seed=1)
    assert (x[0] == x[1]).all()
    assert not jnp.allclose(x[0], x[2], atol=0.1)
    np.testing.assert_allclose(jnp.square(x).mean(1), 1, rtol=1e-5)


@pytest.mark.parametrize("size", [0, CONTEXT - 1])
def test_too_short_a_text_is_refused(size, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=f"has {size} bytes; at least {CONTEXT} are needed"):
        read_text(path)

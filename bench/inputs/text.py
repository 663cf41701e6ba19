"""Real text as the input of a layer: bytes of a file, embedded with their context.

A decode step sees one token of each sequence. Here a token is a byte of the text together with the bytes before it,
each embedded and the further away the fainter, so that equal bytes in unlike contexts are routed apart, as in a model.
The embedding is random; the statistics of the text are real.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

CONTEXT = 16
_FADING = 0.9
_VOCABULARY = 256


def default_text_path() -> pathlib.Path:
    """A long English text that every Python installation carries: the help topics of pydoc."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise ValueError("this Python carries no pydoc_data.topics; pass a text of your own (--help)")
    return pathlib.Path(spec.origin)


def read_text(path: pathlib.Path, option: str = "--input") -> np.ndarray:
    """The bytes of a file, uint8 [length]; errors name the `option` of the command line that named it.

    Raises:
      ValueError: the file cannot be read, or has fewer bytes than one context.
    """
    try:
        data = path.read_bytes()
    except OSError as reason:
        raise ValueError(f"{option} {path}: cannot be read: {reason.strerror}") from None
    if len(data) < CONTEXT:
        raise ValueError(f"{option} {path}: has {len(data)} bytes; at least {CONTEXT} are needed to make a token")
    return np.frombuffer(data, np.uint8)


def sample_contexts(text: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    """`num_tokens` places of the text with the bytes up to them, uint8 [T, CONTEXT], the token itself last."""
    ends = np.random.default_rng(seed).integers(CONTEXT, len(text) + 1, size=num_tokens)
    return text[ends[:, None] + np.arange(-CONTEXT, 0)]


def embed(contexts: jax.Array, hidden_size: int, seed: int) -> jax.Array:
    """Activations of unit root mean square, float32 [T, H], for contexts uint8 [T, CONTEXT]."""
    table = jax.random.normal(jax.random.key(seed), (_VOCABULARY, hidden_size), jnp.float32)
    # A shift of the vector for each step back tells the places of a context apart with one table.
    steps = range(contexts.shape[1])
    x = sum(_FADING**back * jnp.roll(table, back, axis=1)[contexts[:, -1 - back]] for back in steps)
    return x * jax.lax.rsqrt(jnp.square(x).mean(1, keepdims=True))

"""What a model of bytes can do beside giving them probabilities: say the next word, and close brackets.

Both are counted over text that is given, so that an early mistake does no harm later, and both ask what the model would
say: the byte that it holds for the likeliest.

    the |quick |br|own      where | begins a word; of "quick" all five bytes must be right, each after those before it
"""

import dataclasses

import jax
import jax.numpy as jnp

_CLOSING = tuple(b")]}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skills:
    """Counts over a batch, int32 [].

    Attributes:
      words: runs of ASCII letters that begin and end within a sequence.
      words_right: those of which every letter was the likeliest byte.
      brackets: closing brackets: round, square or curly.
      brackets_right: those that were the likeliest byte.
    """

    words: jax.Array
    words_right: jax.Array
    brackets: jax.Array
    brackets_right: jax.Array


def count_skills(tokens: jax.Array, likeliest: jax.Array) -> Skills:
    """Counts what was right.

    Args:
      tokens: integers [B, L + 1], the text.
      likeliest: integers [B, L], for each of the last L bytes of a sequence what the model said, given those before.
    """
    before, actual = tokens[:, :-1], tokens[:, 1:]
    right = likeliest == actual
    place = jnp.arange(actual.shape[1])
    begins = ~_is_letter(before) & _is_letter(actual)
    # The last letter of a word whose next byte is there to show that it is the last.
    ends = _is_letter(actual[:, :-1]) & ~_is_letter(actual[:, 1:])
    last_begin = jax.lax.cummax(jnp.where(begins, place, -1), axis=1)[:, :-1]
    last_wrong = jax.lax.cummax(jnp.where(right, -1, place), axis=1)[:, :-1]
    whole = ends & (last_begin >= 0)
    closes = jnp.isin(actual, jnp.array(_CLOSING))
    return Skills(
        words=whole.sum(dtype=jnp.int32),
        words_right=(whole & (last_wrong < last_begin)).sum(dtype=jnp.int32),
        brackets=closes.sum(dtype=jnp.int32),
        brackets_right=(closes & right).sum(dtype=jnp.int32),
    )


def _is_letter(tokens: jax.Array) -> jax.Array:
    lower = tokens | 0x20
    return (lower >= ord("a")) & (lower <= ord("z"))

"""Words and brackets, against a count with regular expressions."""

import re

import jax
import numpy as np
import pytest

from bench.training.skills import count_skills


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_counts_are_those_of_a_plain_search(rng, wrong):
    text = "".join(rng.choice(["expert", "a", "Router", " ", " ", "(", ")", "]", "}", "x1y", "é"], size=800))
    tokens = np.frombuffer(text.encode()[:960], np.uint8).reshape(8, 120).astype(np.int32)
    likeliest = np.where(rng.random((8, 119)) < wrong, ord("#"), tokens[:, 1:])
    expected = dict.fromkeys(("words", "words_right", "brackets", "brackets_right"), 0)
    for row, said in zip(tokens, likeliest, strict=True):
        line = bytes(row.astype(np.uint8))
        right = [False, *(said == row[1:])]
        for word in re.finditer(rb"(?<=[^A-Za-z])[A-Za-z]+(?=[^A-Za-z])", line):
            expected["words"] += 1
            expected["words_right"] += all(right[word.start() : word.end()])
        for bracket in re.finditer(rb"[)\]}]", line[1:]):
            expected["brackets"] += 1
            expected["brackets_right"] += right[1 + bracket.start()]
    found = jax.jit(count_skills)(tokens, likeliest)
    assert {name: int(getattr(found, name)) for name in expected} == expected
    assert expected["words"] > 50
    assert (expected["words_right"] < expected["words"]) is bool(wrong)

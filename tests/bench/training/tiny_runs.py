"""A model and a text so small that tests can train."""

import numpy as np

from bench.inputs.corpus import Corpus
from bench.training.settings import Settings

SETTINGS = Settings(
    hidden_size=16,
    intermediate_size=16,
    num_experts=8,
    top_k=2,
    num_layers=2,
    num_heads=2,
    batch_size=4,
    length=16,
    steps=8,
    learning_rate=1e-2,
    dtype="float32",
    evaluations=2,
    held_out_batches=1,
)

SIZES = [
    *("--hidden=16", "--intermediate=16", "--experts=8", "--layers=2", "--heads=2"),
    *("--batch=4", "--length=16", "--evaluations=2", "--learning-rate=1e-2"),
]
"""Options of `bench.train` that give these sizes."""


def corpus() -> Corpus:
    """Words in random order: easy to learn something of."""
    rng = np.random.default_rng(0)
    words = rng.choice([b"expert ", b"router ", b"token ", b"layer "], size=4000)
    text = np.frombuffer(b"".join(words), np.uint8)
    chunks = text[: len(text) // 200 * 200].reshape(-1, 200)
    return Corpus(chunks[:-6], chunks[-6:], SETTINGS.length, "words", "")

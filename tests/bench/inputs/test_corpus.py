"""Text for training: what is read, and that nothing held out is trained on."""

import numpy as np
import pytest

from bench.inputs.corpus import HELD_OUT_EVERY, Corpus, load_corpus


@pytest.fixture
def numbered() -> Corpus:
    """A text whose bytes are all different (as integers), to tell places apart."""
    chunks = np.arange(40 * 100).reshape(40, 100)
    return Corpus(chunks, length=9, source="numbers", sha256="")


def test_nothing_held_out_is_trained_on_and_no_sequence_leaves_its_chunk(numbered):
    trained = np.concatenate([numbered.train_batch(50, seed=3, step=step) for step in range(40)])
    held_out = numbered.held_out_batches(4, 5)
    assert held_out.shape == (5, 4, 10)
    assert not set(trained.ravel()) & set(held_out.ravel())
    for sequences in (trained, held_out.reshape(-1, 10)):
        assert (np.diff(sequences, axis=1) == 1).all()
        assert (sequences[:, 0] // 100 == sequences[:, -1] // 100).all()
    # Every byte of the training text is seen sooner or later, and the held-out sequences do not overlap.
    assert len(set(trained.ravel())) > 0.95 * numbered.num_bytes["train"]
    assert len(set(held_out.ravel())) == held_out.size
    assert numbered.num_bytes == {"train": 3800, "held_out": 200}


def test_a_batch_is_a_function_of_seed_and_step(numbered):
    batch = numbered.train_batch(8, seed=1, step=5)
    np.testing.assert_array_equal(batch, numbered.train_batch(8, seed=1, step=5))
    assert (batch != numbered.train_batch(8, seed=1, step=6)).any()
    assert (batch != numbered.train_batch(8, seed=2, step=5)).any()


def test_held_out_text_that_fills_no_batch_is_refused(numbered):
    assert numbered.held_out_batches(20, 3).shape == (1, 20, 10)
    with pytest.raises(ValueError, match=r"has 20 sequences of 9 bytes, fewer than a batch of 21; pass"):
        numbered.held_out_batches(21, 3)


def test_every_python_carries_the_default_text():
    corpus, again = load_corpus(None, 128), load_corpus(None, 64)
    assert corpus.sha256 == again.sha256
    assert corpus.source.startswith("standard library of Python 3.")
    assert corpus.num_bytes["train"] > 1_000_000
    assert b"def " in corpus.chunks[0].tobytes()


def test_a_folder_is_its_texts_in_order(tmp_path):
    for name, content in {"b.txt": b"b" * 300, "a/a.txt": b"a" * 300, ".x": b"x" * 300, "c.bin": b"c\0" * 300}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus(tmp_path, 8)
    assert corpus.chunks.tobytes() == b"a" * 300 + b"\n" + b"b" * 299  # chunks of 30 bytes; the rest is left out
    assert corpus.source == f"{tmp_path} (2 files, 1 that are no text left out)"
    one = load_corpus(tmp_path / "b.txt", 8)
    assert set(one.chunks.ravel()) == {ord("b")}


def test_what_cannot_be_a_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--text .*missing: cannot be read: No such file"):
        load_corpus(tmp_path / "missing", 8)
    (tmp_path / "short.txt").write_bytes(b"x" * (HELD_OUT_EVERY * 9 - 1))
    with pytest.raises(ValueError, match=r"has 179 bytes; sequences of 8 need at least 180"):
        load_corpus(tmp_path / "short.txt", 8)

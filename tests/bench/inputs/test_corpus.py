"""Text for training: what is read, and that nothing held out is trained on."""

import gzip
import lzma

import jax.numpy as jnp
import numpy as np
import pytest

from bench.inputs.corpus import HELD_OUT_EVERY, Corpus, is_held_out_document, load_corpus, sequences


@pytest.fixture
def numbered() -> Corpus:
    """A text whose bytes are all different (as integers), to tell places apart."""
    chunks = np.arange(40 * 100).reshape(40, 100)
    return Corpus(chunks[:38], chunks[38:], length=9, source="numbers", sha256="")


def batches(corpus: Corpus, size: int, seed: int, steps: range) -> np.ndarray:
    return sequences(corpus.train, corpus.train_places(size, seed=seed, steps=steps), corpus.length)


def test_nothing_held_out_is_trained_on_and_no_sequence_leaves_its_chunk(numbered):
    trained = batches(numbered, 50, 3, range(40)).reshape(-1, 10)
    held_out = numbered.held_out_batches(4, 5)
    assert held_out.shape == (5, 4, 10)
    assert not set(trained.ravel()) & set(held_out.ravel())
    for found in (trained, held_out.reshape(-1, 10)):
        assert (np.diff(found, axis=1) == 1).all()
        assert (found[:, 0] // 100 == found[:, -1] // 100).all()
    # Every byte of the training text is seen sooner or later, and the held-out sequences do not overlap.
    assert len(set(trained.ravel())) > 0.95 * numbered.num_bytes["train"]
    assert len(set(held_out.ravel())) == held_out.size
    assert numbered.num_bytes == {"train": 3800, "held_out": 200}


def test_a_batch_is_a_function_of_seed_and_step(numbered):
    batch = batches(numbered, 8, 1, range(5, 7))
    np.testing.assert_array_equal(batch[1:], batches(numbered, 8, 1, range(6, 9))[:1])
    assert (batch[0] != batch[1]).any()
    assert (batch != batches(numbered, 8, 2, range(5, 7))).any()
    # A device cuts the same.
    places = numbered.train_places(8, seed=1, steps=range(5, 7))
    np.testing.assert_array_equal(sequences(jnp.asarray(numbered.train), jnp.asarray(places), 9), batch)


def test_held_out_text_that_fills_no_batch_is_refused(numbered):
    assert numbered.held_out_batches(20, 3).shape == (1, 20, 10)
    with pytest.raises(ValueError, match=r"has 20 sequences of 9 bytes, fewer than a batch of 21; pass"):
        numbered.held_out_batches(21, 3)


def test_every_python_carries_the_default_text():
    corpus, again = load_corpus(None, 128), load_corpus(None, 64)
    assert corpus.sha256 == again.sha256
    assert corpus.source.startswith("standard library of Python 3.")
    assert corpus.num_bytes["train"] > 1_000_000
    assert b"def " in corpus.train[0].tobytes()


def test_a_folder_is_its_texts_in_order(tmp_path):
    for name, content in {"b.txt": b"b" * 300, "a/a.txt": b"a" * 300, ".x": b"x" * 300, "c.bin": b"c\0" * 300}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus(tmp_path, 8)
    # Chunks of 30 bytes, of which the 11th is held out; the rest is left out.
    assert corpus.train.tobytes() == b"a" * 300 + b"b" * 270
    assert corpus.held_out.tobytes() == b"\n" + b"b" * 29
    assert corpus.source == f"{tmp_path} (2 files, 1 that are no text left out)"
    one = load_corpus(tmp_path / "b.txt", 8)
    assert set(one.train.ravel()) == {ord("b")}
    assert one.source == "b.txt"


@pytest.mark.parametrize(("name", "pack"), [("a.xz", lzma.compress), ("a.gz", gzip.compress), ("a", bytes)])
def test_documents_are_held_out_as_a_whole(tmp_path, name, pack):
    documents = [f"{number:03} ".encode() * 25 for number in range(400)]
    (tmp_path / name).write_bytes(pack(b"\0".join(documents)))
    corpus = load_corpus(tmp_path / name, 9)
    held_out = [document for document in documents if is_held_out_document(document)]
    assert 5 <= len(held_out) <= 40  # of the same documents always the same
    assert corpus.held_out.tobytes() == b"\n".join(held_out)
    assert set(corpus.train.tobytes().split()) & {document.split()[0] for document in held_out} == set()
    assert corpus.num_bytes["train"] > 360 * 100


def test_what_cannot_be_a_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--text .*missing: cannot be read: No such file"):
        load_corpus(tmp_path / "missing", 8)
    (tmp_path / "short.txt").write_bytes(b"x" * (HELD_OUT_EVERY * 9 - 1))
    with pytest.raises(ValueError, match=r"has 179 bytes, of which 8 are held out; sequences of 8 need at least 180"):
        load_corpus(tmp_path / "short.txt", 8)
    for name in ("cut.xz", "cut.gz"):
        (tmp_path / name).write_bytes({"cut.xz": lzma, "cut.gz": gzip}[name].compress(b"text" * 1000)[:-20])
        with pytest.raises(ValueError, match=r"--text .*cut\..z: cannot be read: "):
            load_corpus(tmp_path / name, 8)

"""Text for training, as bytes: where it comes from, how it is split, and which of it a step sees.

    corpus = load_corpus(None, length=128)
    places = corpus.train_places(8, seed=0, steps=range(17, 18))  # int32 [1, 8, 2]
    sequences(corpus.train, places[0], corpus.length)             # uint8 [8, 129]

A text whose documents are separated by zero bytes is split by documents: of twenty, one is held out as a whole, which
depends on its bytes alone. Another text is cut into chunks of equal size, of which every 20th is held out. No sequence
crosses the border of a chunk, so that nothing held out is trained on. The batch of a step is a function of seed and
step alone, so that a run that resumes sees what it would have seen.
"""

import dataclasses
import gzip
import hashlib
import lzma
import pathlib
import sys
import sysconfig
import zlib
from collections.abc import Sequence

import jax
import numpy as np

HELD_OUT_EVERY = 20
_MAX_CHUNK = 16 * 1024
_LEFT_OUT = ("ensurepip", "idlelib", "test", "tkinter", "turtledemo")
_UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and its split.

    Attributes:
      train: uint8 [chunks, chunk bytes], to train on.
      held_out: the same, to look at only.
      length: bytes of a sequence, without the one that follows its last.
      source: where the text comes from, in words.
      sha256: of the whole text, in hexadecimal; runs with the same one saw the same text.
    """

    train: np.ndarray
    held_out: np.ndarray
    length: int
    source: str
    sha256: str

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes to train on, and bytes held out."""
        return {"train": self.train.size, "held_out": self.held_out.size}

    def train_places(self, batch_size: int, *, seed: int, steps: Sequence[int]) -> np.ndarray:
        """Where the random sequences of some steps begin: chunk and byte in it, int32 [steps, batch_size, 2]."""
        places = np.empty((len(steps), batch_size, 2), np.int32)
        for number, step in enumerate(steps):
            rng = np.random.default_rng([seed, step])
            places[number, :, 0] = rng.integers(len(self.train), size=batch_size)
            places[number, :, 1] = rng.integers(self.train.shape[1] - self.length, size=batch_size)
        return places

    def held_out_batches(self, batch_size: int, count: int) -> np.ndarray:
        """The same sequences at every call, spread evenly over the held-out chunks, without overlap.

        Returns:
          uint8 [batches, batch_size, length + 1], `count` batches, or as many as the held-out text fills.

        Raises:
          ValueError: the held-out text has fewer sequences than one batch.
        """
        per_chunk = self.held_out.shape[1] // (self.length + 1)
        total = len(self.held_out) * per_chunk
        batches = min(count, total // batch_size)
        if batches < 1:
            raise ValueError(
                f"the held-out text has {total} sequences of {self.length} bytes, fewer than a batch of {batch_size}; "
                "pass a longer --text, or a smaller --batch or --length"
            )
        picked = np.arange(batches * batch_size) * total // (batches * batch_size)
        places = np.stack([picked // per_chunk, picked % per_chunk * (self.length + 1)], axis=-1)
        return sequences(self.held_out, places.reshape(batches, batch_size, 2), self.length)


def sequences[Array: (np.ndarray, jax.Array)](chunks: Array, places: Array, length: int) -> Array:
    """The bytes from each place on, [..., length + 1], of chunks [chunks, chunk bytes] and places [..., 2]."""
    return chunks[places[..., 0, None], places[..., 1, None] + np.arange(length + 1)]


def load_corpus(path: pathlib.Path | None, length: int) -> Corpus:
    """Reads a file, a folder, or the text that every Python installation carries.

    Args:
      path: a file, unpacked if its name ends in .gz or .xz; or a folder, whose files are joined in the order of their
        names, but for hidden ones and those with a zero byte, which are no text; or None for the sources of the
        standard library, which are the same for a given Python version.
      length: bytes of a sequence.

    Raises:
      ValueError: the path cannot be read, or has too little text for one chunk held out.
    """
    text, source = _standard_library() if path is None else _read(path)
    train, held_out = _split(text)
    size = min(_MAX_CHUNK, len(held_out))
    if size < length + 1:
        raise ValueError(
            f"--text {source}: has {len(text):,} bytes, of which {len(held_out):,} are held out; sequences of {length} "
            f"need at least {HELD_OUT_EVERY * (length + 1):,}, so that one in {HELD_OUT_EVERY} can be held out"
        )
    return Corpus(_in_chunks(train, size), _in_chunks(held_out, size), length, source, hashlib.sha256(text).hexdigest())


def is_held_out_document(document: bytes) -> bool:
    """Whether a document of a text that consists of documents is held out: its SHA-256 says so, of one in twenty."""
    return int.from_bytes(hashlib.sha256(document).digest()[:4]) % HELD_OUT_EVERY == 0


def _split(text: bytes) -> tuple[bytes, bytes]:
    """What to train on, and what is held out."""
    documents = text.split(b"\0")
    if len(documents) > 1:
        held_out = [document for document in documents if is_held_out_document(document)]
        return b"\n".join(document for document in documents if not is_held_out_document(document)), b"\n".join(
            held_out
        )
    size = min(_MAX_CHUNK, max(1, len(text) // HELD_OUT_EVERY))
    chunks = _in_chunks(text, size)
    is_held_out = np.arange(len(chunks)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    return chunks[~is_held_out].tobytes(), chunks[is_held_out].tobytes()


def _in_chunks(text: bytes, size: int) -> np.ndarray:
    """Uint8 [chunks, size]; the rest, less than a chunk, is left out."""
    return np.frombuffer(text, np.uint8)[: len(text) // size * size].reshape(-1, size)


def _read(path: pathlib.Path) -> tuple[bytes, str]:
    try:
        if not path.is_dir():
            return _UNPACK.get(path.suffix, bytes)(path.read_bytes()), path.name
        shown = (file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts))
        contents = [file.read_bytes() for file in sorted(shown) if file.is_file()]
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as reason:
        raise ValueError(f"--text {path}: cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    texts = [content for content in contents if b"\0" not in content]
    return b"\n".join(texts), f"{path} ({len(texts)} files, {len(contents) - len(texts)} that are no text left out)"


def _standard_library() -> tuple[bytes, str]:
    """The modules that this version of Python lists, without those that distributions split off."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files: list[pathlib.Path] = []
    for name in sorted(sys.stdlib_module_names.difference(_LEFT_OUT)):
        module = root / f"{name}.py"
        files += [module] if module.is_file() else sorted((root / name).rglob("*.py"))
    if not files:
        raise ValueError(f"this Python has no sources of its standard library under {root}; pass a text with --text")
    version = ".".join(map(str, sys.version_info[:3]))
    return b"\n".join(
        [file.read_bytes() for file in files]
    ), f"standard library of Python {version}, {len(files)} files"

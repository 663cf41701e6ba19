"""Text for training, as bytes: where it comes from, how it is split, and which of it a step sees.

    corpus = load_corpus(None, length=128)
    corpus.train_batch(8, seed=0, step=17)  # uint8 [8, 129]

The text is cut into chunks of equal size. Every 20th is held out as a whole, and no sequence crosses the border of a
chunk, so that nothing held out is trained on. The batch of a step is a function of seed and step alone, so that a run
that resumes sees what it would have seen.
"""

import dataclasses
import hashlib
import pathlib
import sys
import sysconfig

import numpy as np

HELD_OUT_EVERY = 20
_MAX_CHUNK = 16 * 1024
_LEFT_OUT = ("ensurepip", "idlelib", "test", "tkinter", "turtledemo")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and its split.

    Attributes:
      chunks: uint8 [chunks, chunk bytes].
      length: bytes of a sequence, without the one that follows its last.
      source: where the text comes from, in words.
      sha256: of the whole text, in hexadecimal; runs with the same one saw the same text.
    """

    chunks: np.ndarray
    length: int
    source: str
    sha256: str

    @property
    def is_held_out(self) -> np.ndarray:
        """Bool [chunks]."""
        return np.arange(len(self.chunks)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes to train on, and bytes held out."""
        held_out = int(self.is_held_out.sum())
        size = self.chunks.shape[1]
        return {"train": (len(self.chunks) - held_out) * size, "held_out": held_out * size}

    def train_batch(self, batch_size: int, *, seed: int, step: int) -> np.ndarray:
        """Random sequences of the training chunks with the byte that follows each, uint8 [batch_size, length + 1]."""
        rng = np.random.default_rng([seed, step])
        trained = np.flatnonzero(~self.is_held_out)
        chunks = trained[rng.integers(len(trained), size=batch_size)]
        starts = rng.integers(self.chunks.shape[1] - self.length, size=batch_size)
        return self._sequences(chunks, starts)

    def held_out_batches(self, batch_size: int, count: int) -> np.ndarray:
        """The same sequences at every call, spread evenly over the held-out chunks, without overlap.

        Returns:
          uint8 [batches, batch_size, length + 1], `count` batches, or as many as the held-out text fills.

        Raises:
          ValueError: the held-out text has fewer sequences than one batch.
        """
        held_out = np.flatnonzero(self.is_held_out)
        per_chunk = self.chunks.shape[1] // (self.length + 1)
        total = len(held_out) * per_chunk
        batches = min(count, total // batch_size)
        if batches < 1:
            raise ValueError(
                f"the held-out text has {total} sequences of {self.length} bytes, fewer than a batch of {batch_size}; "
                "pass a longer --text, or a smaller --batch or --length"
            )
        picked = np.arange(batches * batch_size) * total // (batches * batch_size)
        sequences = self._sequences(held_out[picked // per_chunk], picked % per_chunk * (self.length + 1))
        return sequences.reshape(batches, batch_size, self.length + 1)

    def _sequences(self, chunks: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return self.chunks[chunks[:, None], starts[:, None] + np.arange(self.length + 1)]


def load_corpus(path: pathlib.Path | None, length: int) -> Corpus:
    """Reads a file, a folder, or the text that every Python installation carries.

    Args:
      path: a file; or a folder, whose files are joined in the order of their names, but for hidden ones and those with
        a zero byte, which are no text; or None for the sources of the standard library, which are the same for a given
        Python version.
      length: bytes of a sequence.

    Raises:
      ValueError: the path cannot be read, or has too little text for one chunk held out.
    """
    text, source = _standard_library() if path is None else _read(path)
    size = min(_MAX_CHUNK, len(text) // HELD_OUT_EVERY)
    if size < length + 1:
        raise ValueError(
            f"--text {source}: has {len(text):,} bytes; sequences of {length} need at least "
            f"{HELD_OUT_EVERY * (length + 1):,}, so that one in {HELD_OUT_EVERY} can be held out"
        )
    # The rest, less than a chunk, is left out.
    chunks = text[: len(text) // size * size].reshape(-1, size)
    return Corpus(chunks, length, source, hashlib.sha256(text).hexdigest())


def _read(path: pathlib.Path) -> tuple[np.ndarray, str]:
    try:
        if not path.is_dir():
            return np.fromfile(path, np.uint8), str(path)
        shown = (file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts))
        contents = [file.read_bytes() for file in sorted(shown) if file.is_file()]
    except OSError as reason:
        raise ValueError(f"--text {path}: cannot be read: {reason.strerror}") from None
    texts = [content for content in contents if b"\0" not in content]
    return _joined(texts), f"{path} ({len(texts)} files, {len(contents) - len(texts)} that are no text left out)"


def _standard_library() -> tuple[np.ndarray, str]:
    """The modules that this version of Python lists, without those that distributions split off."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files: list[pathlib.Path] = []
    for name in sorted(sys.stdlib_module_names.difference(_LEFT_OUT)):
        module = root / f"{name}.py"
        files += [module] if module.is_file() else sorted((root / name).rglob("*.py"))
    if not files:
        raise ValueError(f"this Python has no sources of its standard library under {root}; pass a text with --text")
    version = ".".join(map(str, sys.version_info[:3]))
    return _joined([file.read_bytes() for file in files]), f"standard library of Python {version}, {len(files)} files"


def _joined(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(texts), np.uint8)

"""Text files that are read with clear errors and written whole or not at all, and folders that one run holds."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from bench.processes.file_lock import lock

_HELD = ".held"


def read_text(path: pathlib.Path) -> str:
    """A file in UTF-8.

    Raises:
      ValueError: it is not in UTF-8.
      OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: is no text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from error


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file beside the old one and puts it in its place, so that no reader finds a part of it.

    Raises:
      OSError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():  # /dev/null, say, which is to stay what it is; a folder is an error
            path.write_text(text, encoding="utf-8")
            return
        path = path.resolve()  # of a link, what it leads to
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; give a writable file, or - for standard output") from error


@contextlib.contextmanager
def holding(folder: pathlib.Path) -> Iterator[None]:
    """Reserves a folder for this run, creating it if needed.

    Raises:
      ValueError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A file, as some network file systems lock no folders. It stays, since whoever waits may have opened it.
    with open(folder / _HELD, "a+", encoding="utf-8") as file:
        if not lock(file.fileno(), "alone", wait=False):
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by another run, process {file.read().strip() or 'unknown'}; wait until it ends, "
                "or pass another --out"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield

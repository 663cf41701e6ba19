"""Documents out of files: unpacked, English, cut where they are lists, and without what was said before.

All is done on bytes, so that the result does not depend on the version of Python.
"""

import gzip
import re
from collections.abc import Iterable, Iterator

_PART = 16 * 1024
_LEAST = 200
_LONG = 80
_MOST_FOREIGN = 0.02
_COMMON = frozenset(b"the of and to a in is that for it as be with on are this by or not if".split())
_BLANK_LINES = re.compile(rb"\n[ \t]*\n")


def unpacked(content: bytes) -> bytes:
    """What a file says, which may be packed by gzip or dictzip."""
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def in_parts(text: bytes) -> list[bytes]:
    """A long list of entries, cut at blank lines into parts of at least 16 KiB, but for the last."""
    parts: list[list[bytes]] = [[]]
    size = 0
    for paragraph in _BLANK_LINES.split(text):
        if size >= _PART:
            parts.append([])
            size = 0
        parts[-1].append(paragraph)
        size += len(paragraph)
    return [b"\n\n".join(part) for part in parts]


def is_english(text: bytes) -> bool:
    """Whether nearly all bytes are ASCII, and none is zero."""
    foreign = sum(len(run) for run in re.findall(rb"[\x80-\xff]+", text))
    return b"\0" not in text and foreign <= _MOST_FOREIGN * len(text)


def without_repeats(documents: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Origins and texts, without paragraphs of 80 bytes or more that came before, spaces aside, and texts of under 200.

    So a licence, say, with which many files begin is in one document only.
    """
    seen: set[bytes] = set()
    for origin, text in documents:
        kept = []
        for paragraph in _BLANK_LINES.split(text.strip(b"\n")):
            words = b" ".join(paragraph.split())
            if len(words) < _LONG or words not in seen:
                kept.append(paragraph)
                seen.add(words)
        shortened = b"\n\n".join(kept)
        if len(shortened) >= _LEAST:
            yield origin, shortened


def prose_share(text: bytes) -> float:
    """The share of bytes in paragraphs that read as English prose: of their words, a fifth are among the commonest 20.

    Code, tables and lists of names mostly do not.
    """
    paragraphs = _BLANK_LINES.split(text)
    prose = 0
    for paragraph in paragraphs:
        words = paragraph.lower().split()
        prose += len(paragraph) * (sum(word in _COMMON for word in words) >= 0.2 * max(1, len(words)))
    return prose / max(1, sum(map(len, paragraphs)))

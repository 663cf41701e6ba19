"""Documents out of files."""

import gzip

from bench.inputs.documents import in_parts, is_english, prose_share, unpacked, without_repeats

PROSE = b"The router sends each of the tokens to the experts that it holds for the best, and adds what they return."
CODE = b"def route(tokens):\n    return tokens[:, None] @ kernel"


def test_packed_files_are_unpacked():
    assert unpacked(gzip.compress(b"text")) == unpacked(b"text") == b"text"


def test_a_list_is_cut_at_blank_lines():
    entries = [b"entry %d\n   says something" % number * 40 for number in range(100)]
    parts = in_parts(b"\n\n".join(entries))
    assert b"\n\n".join(parts) == b"\n\n".join(entries)
    assert len(parts) == 7
    assert all(16 * 1024 <= len(part) < 18 * 1024 for part in parts[:-1])


def test_what_is_not_english_is_told_apart():
    assert is_english(PROSE * 2 + " — so it is said.".encode())
    assert not is_english("Роутер посылает каждый токен к экспертам.".encode())
    assert not is_english(PROSE + b"\0")


def test_what_was_said_before_is_left_out():
    licence = b"You may copy this text, and what is made of it, wherever you say who wrote it, and under these terms."
    assert len(PROSE) > 80
    assert len(licence) > 80
    documents = [
        ("a", b"\n\n".join([licence, PROSE, CODE])),
        ("b", b"\n \n".join([licence.replace(b" ", b"\n   "), CODE, b"x" * 200])),
        ("c", licence),
    ]
    assert list(without_repeats(documents)) == [documents[0], ("b", CODE + b"\n\n" + b"x" * 200)]


def test_prose_is_told_from_code():
    assert prose_share(PROSE) == 1
    assert prose_share(CODE) == 0
    assert prose_share(PROSE + b"\n\n" + CODE) == len(PROSE) / (len(PROSE) + len(CODE))
    assert prose_share(b"") == 0

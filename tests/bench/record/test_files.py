"""Files are written whole or not at all, and a folder is for one run at a time."""

import os
import pathlib
import stat

import pytest

from bench.record.files import holding, read_text, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "report.html"
    write_whole(path, "old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"  # not a part of each
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "page.md"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_and_a_device_stay_what_they_are(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    write_whole(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    write_whole(pathlib.Path(os.devnull), "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_text_in_another_encoding_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_bytes(b"one\ntwo\n\xff")
    with pytest.raises(ValueError, match=r"page\.md, line 3: is no text in UTF-8"):
        read_text(path)
    with pytest.raises(OSError, match=r"cannot read .*: Is a directory"):
        read_text(tmp_path)


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path):
    folder = tmp_path / "new" / "results"
    for _ in range(2):
        with (
            holding(folder),
            pytest.raises(ValueError, match=f"results is in use by another run, process {os.getpid()}; wait until"),
            holding(folder),
        ):
            pass

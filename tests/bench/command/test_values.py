"""Types of options: what they take, and what they say of the rest."""

import argparse
import pathlib

import pytest

from bench.command import values


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (values.positive_int, "1", 1),
        (values.natural_int, "0", 0),
        (values.positive_int, str(2**63 - 1), 2**63 - 1),
        (values.positive_float, "1e-3", 1e-3),
        (values.natural_float, "0", 0.0),
        (values.POSITIVE_INTS, "8192, 16384", [8192, 16384]),
        (values.NAMES, "a, b", ["a", "b"]),
        (values.output_file, "-", "-"),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (values.positive_int, "0", "must be a whole number of at least 1, got '0'"),
        (values.positive_int, "1.5", "must be a whole number of at least 1, got '1.5'"),
        (values.positive_int, str(2**63), "must be a whole number of at most 9223372036854775807, got '92"),
        (values.seed_number, "-1", "must be a whole number of at least 0, got '-1'"),
        (values.seed_number, str(2**31), "must be a whole number of at most 2147483647, got '2147483648'"),
        *(
            (values.positive_float, text, f"must be a positive number, got '{text}'")
            for text in ("0", "nan", "inf", "x")
        ),
        *(
            (values.natural_float, text, f"must be a number of at least 0, got '{text}'")
            for text in ("-1", "nan", "inf")
        ),
        (values.POSITIVE_INTS, "1,,2", "must be a whole number of at least 1, got ''"),
    ],
)
def test_what_is_refused(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value).startswith(message)


def test_outputs(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("{}")
    for text in (str(there), str(tmp_path / "new.json")):
        assert values.output_file(text) == text
    for path in (tmp_path, tmp_path / "new" / "deep"):
        assert values.output_folder(str(path)) == path
    for parse, path, reason in (
        (values.output_file, tmp_path, "it is a folder"),
        (values.output_file, tmp_path / "new" / "x.json", f"there is no folder {tmp_path / 'new'}"),
        (values.output_folder, there, f"{there} is no folder"),
        (values.output_folder, there / "below", f"{there} is no folder"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{path}: {reason}; give a f"):
            parse(str(path))


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="there is no folder that nobody can write to")
def test_what_is_read_only_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="the folder /proc is read-only"):
        values.output_file("/proc/x.json")
    with pytest.raises(argparse.ArgumentTypeError, match="/proc is read-only"):
        values.output_folder("/proc/x")

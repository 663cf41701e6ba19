"""Command lines: errors of one line, examples, and readers that leave early."""

import os
import subprocess
import sys

import pytest

from bench.command.parser import make_parser, run


@pytest.mark.parametrize("error", [ValueError("batch_size must\n be 1"), OSError("batch_size must be 1")])
def test_run_shows_an_error_in_one_line(error, capsys):
    def main(argv):
        raise error

    assert run(main, []) == 2
    assert capsys.readouterr() == ("", "error: batch_size must be 1\n")


def test_run_passes_the_status_and_other_errors_on():
    assert run(lambda argv: None, []) == 0
    assert run(lambda argv: 3, []) == 3
    assert run(len, ["a"]) == 1

    def fault(argv):
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        run(fault, [])
    with pytest.raises(KeyError):
        run(lambda argv: {}["x"], [])


def test_an_interruption_and_sizes_beyond_the_memory_are_one_line(capsys):
    for error, status, line in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("4 PiB"), 2, "error: the sizes are too large for this machine: 4 PiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out"), 2, "error: the sizes are too large for this machine: RESOURCE_EXHA"),
    ):

        def main(argv, error=error):
            raise error

        assert run(main, []) == status
        assert capsys.readouterr().err.startswith(line)
    with pytest.raises(RuntimeError, match="another"):
        run(lambda argv: exec("raise RuntimeError('another')"), [])


def test_parser_shows_examples_and_raises(capsys):
    parser = make_parser("bench.thing", "What it does.", ["--n 3"])
    parser.add_argument("--n", type=int)
    assert run(lambda argv: parser.parse_args(argv) and None, ["--n", "x"]) == 2
    assert capsys.readouterr().err == (
        "error: argument --n: invalid int value: 'x' (python -m bench.thing --help lists the options)\n"
    )
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    assert "examples:\n  python -m bench.thing --n 3" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from bench.command.parser import run; sys.exit(run(lambda argv: print('x\\n' * 200_000)))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")

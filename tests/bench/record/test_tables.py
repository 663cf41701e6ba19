import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench.command.parser import make_parser, run
from bench.model.roofline import model_layer
from bench.model.workloads import Workload
from bench.record.tables import format_table, layer_table, write_json
from pallas_kernels.chips import get_chip


def test_table_aligns_numbers_to_the_right():
    table = format_table(["name", "time", "bytes"], [["gate", 0.43064, 3309568], ["combine", 13.5, None]])
    assert table.splitlines() == [
        "name       time      bytes",
        "-------  ------  ---------",
        "gate      0.431  3,309,568",
        "combine  13.500          -",
    ]


def test_table_without_rows_is_its_header():
    assert format_table(["a", "bb"], []) == "a  bb\n-  --"


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match=r"each row must have 2 cells, one for each of \['a', 'b'\]; got \[1\]"):
        format_table(["a", "b"], [[1]])


def test_layer_table_ends_with_the_sum():
    layer = model_layer(get_chip("v32-run"), Workload(7168, 2048, 2048, 256, 8, 1536, 1, 32, 32, 1))
    lines = layer_table(layer).splitlines()
    assert len(lines) == 2 + len(layer.operators) + 1
    assert "8,48,7168,2048" in lines[6]
    assert lines[6].split()[-3:] == ["17.961", "129.237", "81.734"]
    assert f"{layer.elapsed:,.3f}" in lines[-1]


def test_json_to_a_file_and_to_standard_output(tmp_path, capsys):
    data = {"a": np.float64(1.5), "b": [np.int64(2)], "c": None}
    write_json(data, str(tmp_path / "out.json"))
    write_json(data, "-")
    expected = {"a": 1.5, "b": [2], "c": None}
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    assert json.loads(capsys.readouterr().out) == expected


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(
        OSError, match=r"cannot write .*/missing/x\.json: No such file or directory; give a writable file"
    ):
        write_json({}, str(tmp_path / "missing" / "x.json"))
    with pytest.raises(OSError, match="Is a directory"):
        write_json({}, str(tmp_path))
    with pytest.raises(ValueError, match="JSON"):
        write_json({"a": float("inf")}, "-")
    with pytest.raises(TypeError, match="set has no JSON form"):
        write_json({"a": {1}}, "-")


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

import json

import numpy as np
import pytest

from bench.record.json_files import write_json


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

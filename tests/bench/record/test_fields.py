"""What is amiss in a value is said in one line, with its name."""

import dataclasses

import pytest

from bench.record.fields import check


@dataclasses.dataclass
class Tile:
    rows: int
    name: str


EXPECTED = {
    "step": int,
    "loss": (float, None),
    "kind": {"a", "b"},
    "load": [[float]],
    "peers": {str: lambda peer: {"error": str} if "error" in peer else {"us": float}},
    "tile": Tile,
}
GOOD = {
    "step": 1,
    "loss": None,
    "kind": "a",
    "load": [[1, 2.5], []],
    "peers": {"x": {"us": 1}, "y": {"error": "no"}},
    "tile": {"rows": 64, "name": "t"},
    "more": object(),
}


def test_what_is_expected_passes():
    check(GOOD, EXPECTED, "file")
    check(GOOD | {"loss": 2.0}, EXPECTED, "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 1.5}, "step must be a whole number, got 1.5"),
        ({"step": True}, "step must be a whole number, got True"),
        ({"loss": "low"}, "loss must be a number or null, got 'low'"),
        ({"kind": []}, "kind must be one of a, b, got []"),
        ({"load": [[1], [2, None]]}, "load[1][1] must be a number, got None"),
        ({"peers": {"x": {}}}, "peers.x.us is missing"),
        ({"peers": {"x": 3}}, "peers.x must be an object, got 3"),
        ({"tile": {"rows": 64}}, "tile.name is missing"),
        ({"tile": {"rows": 64, "name": "t", "depth": 1}}, "tile.depth is unknown; known are rows, name"),
    ],
)
def test_what_is_not_expected_is_named(changes, message):
    with pytest.raises(ValueError, match=r"^file") as error:
        check(GOOD | changes, EXPECTED, "file")
    assert str(error.value) == f"file: {message}"


def test_another_kind_of_value_altogether():
    with pytest.raises(ValueError, match=r"^file: it must be an object, got 3$"):
        check(3, EXPECTED, "file")

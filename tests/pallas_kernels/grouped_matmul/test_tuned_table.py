"""The table of tuned configurations: when it is asked, and whether the kernels can do what it says."""

import dataclasses
import json

import pytest

from pallas_kernels.chips import CHIPS, get_chip
from pallas_kernels.grouped_matmul.gpu.hopper import tiling, tuned_table
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Problem
from pallas_kernels.grouped_matmul.gpu.hopper.tuned_table import Key, parse_table, tuned_configs

H200 = get_chip("h200")
PRODUCT = Problem("bfloat16", False, False, False, num_groups=8, num_rows=8 * 48, depth=7168, columns=2048)
KEY = Key("bfloat16", False, False, False, 8, 64, 7168, 2048)
TUNED = tiling.Config(64, 64, 5, 1, 4)


@pytest.fixture
def table(monkeypatch):
    """The table of an H200."""
    entries = {KEY: TUNED}
    monkeypatch.setattr(tiling, "tuned_configs", lambda chip: entries if chip == "h200" else {})
    return entries


@pytest.mark.parametrize("rows", [33, 48, 64])
def test_an_entry_wins_for_as_many_rows_up_to_a_power_of_two(table, rows):
    assert tiling.pick(H200, dataclasses.replace(PRODUCT, num_rows=8 * rows)) == TUNED


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": 8 * 32},
        {"num_rows": 8 * 65},
        {"num_groups": 4, "num_rows": 4 * 48},
        {"depth": 2048},
        {"columns": 4096},
        {"operand": "float16"},
        {"block_scales": True},
        {"fused": True},
    ],
)
def test_other_products_fall_to_the_model(table, change):
    with_table = tiling.pick(H200, dataclasses.replace(PRODUCT, **change))
    table.clear()
    assert with_table == tiling.pick(H200, dataclasses.replace(PRODUCT, **change)) != TUNED


def test_other_chips_fall_to_the_model(table):
    assert tiling.pick(get_chip("h100"), PRODUCT) != TUNED


def test_an_entry_that_the_result_does_not_allow_falls_to_the_model(table):
    fused = dataclasses.replace(PRODUCT, operand="float8_e4m3fn", fused=True)
    key = Key("float8_e4m3fn", False, True, False, 8, 64, 7168, 2048)
    deep = tiling.Config(64, 256, 5, 2, 4)  # a wider result does not fit beside it
    table |= {key: deep, dataclasses.replace(key, result_in_8_bits=True): deep}
    assert tiling.pick(H200, fused) != deep
    assert tiling.pick(H200, dataclasses.replace(fused, result_in_8_bits=True)) == deep


def test_forced_comes_first(table):
    config = tiling.Config(128, 256, 2, 2, 1)
    with tiling.forced(config):
        assert tiling.pick(H200, PRODUCT) == config
    assert tiling.pick(H200, PRODUCT) == TUNED


@pytest.mark.parametrize(("rows", "rounded"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (4096, 4096)])
def test_rows_are_rounded_up_to_a_power_of_two(rows, rounded):
    assert Key.of(dataclasses.replace(PRODUCT, num_rows=8 * rows)).rows == rounded


@pytest.mark.parametrize("chip", list(CHIPS.values()), ids=list(CHIPS))
def test_every_tuned_configuration_fits(chip):
    for key, config in tuned_configs(chip.name).items():
        fields = dataclasses.asdict(key)
        problem = Problem(**fields | {"num_rows": key.num_groups * fields.pop("rows")})
        assert tiling.fits(chip, problem, config), key
        assert key.rows == 1 << (key.rows - 1).bit_length()


@pytest.mark.parametrize(
    "config",
    [
        tiling.Config(64, 64, 40, 1, 1),  # more than shared memory
        tiling.Config(64, 64, 1, 1, 1),
        tiling.Config(64, 64, 4, 1, 0),
        tiling.Config(64, 64, 4, 1, 1, out_slots=0),
        tiling.Config(64, 64, 4, 2, 1),
        tiling.Config(64, 96, 4, 1, 1),
    ],
)
def test_what_does_not_fit_is_told(config):
    assert not tiling.fits(H200, PRODUCT, config)


def test_files_say_where_they_come_from():
    folder = tuned_table.importlib.resources.files("pallas_kernels.grouped_matmul.gpu.hopper") / "tuned"
    files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    assert "h200.json" in [file.name for file in files]
    for file in files:
        table = json.loads(file.read_text())
        assert {"chip", "driver", "versions", "commit", "date", "entries"} <= set(table)
        assert len(parse_table(table)) == len(table["entries"])
        for entry in table["entries"]:
            assert entry["us"] < entry["model_us"]

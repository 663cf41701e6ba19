"""What a record says is what was measured; a file of them outlives being cut off."""

import json
import math

import pytest

from bench.measure.samples import paired, summarise
from bench.one_chip.records import comparison, failure, lines_of, measured_cases, measured_record, read_lines
from bench.one_chip.work import Work
from bench.record.json_files import append_records
from tests.bench.one_chip.small_cases import small

ORIGIN = {
    "command": "python -m bench.layer",
    "chip": "chip",
    "driver": None,
    "versions": {"jax": "1"},
    "commit": "abc",
}
LOAD = {"load_cv": 0.5, "load_kl": 0.1, "load_entropy": 0.9, "overflow_rate": 0.2}


def record(**changes):
    fields = {
        "case": small("layer"),
        "operator": "layer",
        "layout": "padded",
        "backend": "auto",
        "clock": "wall",
        "time_us": summarise([90.0, 110.0]),
        "work": Work(flops=10**9, hbm_bytes=10**7),
        "load": LOAD,
        "program_bytes": 123,
    }
    return measured_record(**(fields | changes))


def test_rates_are_work_over_the_mean_time():
    line = record(work=Work(2 * 10**9, 3 * 10**6, 4 * 10**6, 5 * 10**6))
    assert line["mean_us"] == line["p50_us"] == 100
    assert line["tokens_per_s"] == pytest.approx(64 / 100e-6)
    assert line["tflops"] == pytest.approx(20)
    assert (line["hbm_gb_per_s"], line["bw_32k"], line["bw_strict"]) == pytest.approx((30, 40, 50))
    assert record()["bw_32k"] is None


def test_fields_of_where_what_and_load():
    (line,) = lines_of([record(drop_rate=0.25)], ORIGIN)
    assert (line["chip"], line["commit"], line["versions"], line["seed"]) == ("chip", "abc", {"jax": "1"}, 0)
    assert line["time"].endswith("+00:00")
    assert (line["load_cv"], line["load_kl"], line["load_entropy"], line["overflow_rate"]) == (0.5, 0.1, 0.9, 0.2)
    assert (line["tokens"], line["experts"], line["k"], line["hidden"], line["capacity_factor"]) == (64, 4, 2, 32, 1.25)
    assert line["drop_rate"] == 0.25
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_routing_share_is_what_is_not_the_experts():
    stages = {"router": 1.0, "plan": 2.0, "dispatch": 3.0, "gate_up": 8.0, "down": 4.0, "combine": 2.0}
    assert record(stages_us=stages)["routing_share"] == pytest.approx(8 / 20)
    assert record()["routing_share"] is None
    assert record(stages_us={"plan": 1.0, "pack": 1.0})["routing_share"] is None


def test_memory_names_its_source():
    compiled, device = record(), record(peak_bytes=456)
    assert (compiled["peak_memory_bytes"], compiled["peak_memory_source"]) == (123, "compiled")
    assert (device["peak_memory_bytes"], device["peak_memory_source"]) == (456, "device")


def test_comparison():
    line = record(paired=comparison("compact", "auto", paired([1.0, 2.0], [2.0, 4.0])))
    assert {name: value for name, value in line["paired"].items() if name != "ci95_us"} == {
        "layout": "compact",
        "backend": "auto",
        "pairs": 2,
        "difference_us": -1.5,
        "ratio": 0.5,
    }


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_a_result_that_is_not_finite_is_no_record(error):
    with pytest.raises(ValueError, match="layer, layout padded, backend auto: result is not finite"):
        record(identity_error=error)


def test_a_file_that_was_cut_off_goes_on_behind_its_last_whole_case(tmp_path):
    path = tmp_path / "new" / "sweep.jsonl"
    first, second = small("layer"), small("layer", k=1)
    for case in (first, second):
        append_records(path, lines_of([record(case=case), record(case=case, layout="compact")], ORIGIN))
    assert measured_cases(read_lines(path), "chip") == {first.key, second.key}
    assert measured_cases(read_lines(path), "another chip") == set()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert len(read_lines(path)) == 3
    assert measured_cases(read_lines(path), "chip") == {first.key}
    append_records(path, lines_of([record(case=second), record(case=second, layout="compact")], ORIGIN))
    assert len(read_lines(path)) == 5
    assert measured_cases(read_lines(path), "chip") == {first.key, second.key}


def test_failed_cases_are_not_measured(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append_records(path, [failure(small("layer"), ORIGIN, "out of memory")])
    assert read_lines(path)[0]["error"] == "out of memory"
    assert measured_cases(read_lines(path), "chip") == set()


def test_a_file_of_something_else_is_an_error(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append_records(path, lines_of([record()], ORIGIN))
    good = path.read_text()
    for line, message in (
        ("hello", "not valid JSON"),
        ("[]", r"it must be an object, got \[\]"),
        ('{"case": "x"}', "error is missing"),
        (good.strip().replace('"k": 2', '"k": "two"'), "k must be a whole number, got 'two'"),
    ):
        path.write_text(f"{good}{line}\n")
        with pytest.raises(ValueError, match=rf"sweep\.jsonl, line 2: {message}"):
            read_lines(path)


def test_no_file_no_records(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []

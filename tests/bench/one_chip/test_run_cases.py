"""Many cases into one file: what is there is not measured again, what fails does not end the rest, time is kept."""

import io

import pytest

from bench import topk
from bench.measure.steps import StepTimer
from bench.one_chip.run_cases import problems, run_cases
from bench.record.progress import Progress
from tests.bench.one_chip.small_cases import lines, small

ORIGIN = {"command": "command", "chip": "chip", "driver": None, "versions": {}, "commit": "abc"}
CASES = [small("topk", k=k) for k in (1, 2, 3)]


@pytest.fixture
def go(tmp_path):
    """Runs cases; the seconds that pass with each are those of `clock`."""
    clock, now, ran = StepTimer(), [0.0], []

    def run(cases=CASES, seconds=0.0, broken=(), **settings):
        def run_case(case, clock, rounds):
            now[0] += seconds
            ran.append(case.k)
            if case.k in broken:
                raise MemoryError("no\nroom")
            return topk.run_case(case, clock, rounds)

        stream = io.StringIO()
        progress = Progress(len(cases), stream, lambda: now[0])
        path = tmp_path / "sweep.jsonl"
        ran.clear()
        outcome = run_cases(cases, run_case, clock, ORIGIN, path=path, repeats=2, progress=progress, **settings)
        return outcome, list(ran), stream.getvalue()

    return run


def test_cases_are_measured_once(go, tmp_path):
    outcome, ran, _ = go(CASES[:2])
    assert (ran, outcome.failures, outcome.num_left) == ([1, 2], [], 0)
    outcome, ran, said = go()
    assert ran == [3]
    assert "2 of 3 cases are in" in said
    assert [record["k"] for record in outcome.records] == [1, 2, 3]
    assert [record["k"] for record in lines(tmp_path / "sweep.jsonl")] == [1, 2, 3]


def test_no_case_is_begun_that_would_end_too_late(go):
    outcome, ran, _ = go(seconds=40.0, minutes=1.0)
    assert (ran, outcome.num_left) == ([1], 2)
    outcome, ran, _ = go(seconds=10.0, minutes=1.0)
    assert (ran, outcome.num_left) == ([2, 3], 0)


def test_a_failure_is_noted_and_tried_again_after_the_others(go, tmp_path):
    outcome, ran, _ = go(CASES[:2], broken=[1])
    assert ran == [1, 2]
    assert outcome.failures == [f"{CASES[0].key}: MemoryError: no room"]
    assert [record["error"] for record in lines(tmp_path / "sweep.jsonl")] == ["MemoryError: no room", None]
    outcome, ran, _ = go()
    assert (ran, outcome.failures) == ([3, 1], [])


def test_wrong_results_are_told(go):
    outcome, _, _ = go(CASES[:1])
    (line,) = outcome.records
    assert problems([line]) == []
    assert problems([{**line, "identity_error": 2e-3}]) == [
        f"{line['case']}: top_k/None/auto: identity_error 2.0e-03, limit 1e-03"
    ]
    assert "agreement_error 5.0e-02, limit 2e-02" in problems([{**line, "agreement_error": 5e-2}])[0]

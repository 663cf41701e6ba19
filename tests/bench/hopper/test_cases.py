"""Which cases there are, what they cost, and what they are to reach."""

import pytest

from bench.hopper.cases import CASES, Goal, select_cases
from bench.model.roofline import roofline_gemm
from pallas_kernels.chips import get_chip

H200 = get_chip("h200")


def test_all_cases_in_the_order_of_the_table():
    assert [case.name for case in select_cases(None)] == list(CASES)
    assert len(CASES) == 24


def test_of_few_tokens_only_the_experts_that_are_chosen_are_read():
    shapes = [CASES[name].shape for name in ("qwen3-fp8-1", "qwen3-fp8-8", "qwen3-fp8-64")]
    assert [shape.G for shape in shapes] == [8, 52, 128]
    assert [CASES[name].shape.G for name in ("gpt-oss-fp8-1", "gpt-oss-fp8-8")] == [4, 29]
    weights = 8 * 3 * 2048 * 768
    assert weights < CASES["qwen3-fp8-1"].hbm_bytes < 1.02 * weights


def test_cases_by_name():
    assert [case.name for case in select_cases(["down-fp8", "decode-fp8"])] == ["decode-fp8", "down-fp8"]


def test_an_unknown_case_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="unknown case 'decode' in --cases; expected some of decode-fp8, decode-bf16,"):
        select_cases(["decode", "down-fp8"])


@pytest.mark.parametrize(
    ("name", "us"),
    [("decode-fp8", 25.4), ("decode-bf16", 50.6), ("many-bf16", 90.1), ("down-fp8", 25.8), ("layer-fp8", 75.6)],
)
def test_floors_by_the_data_sheet(name, us):
    assert CASES[name].floor_us(H200) == pytest.approx(us, rel=5e-3)


@pytest.mark.parametrize("name", ["decode-fp8", "prefill-bf16", "prefill-fp8", "down-fp8"])
def test_floors_are_those_of_the_roofline(name):
    case = CASES[name]
    assert case.floor_us(H200) == pytest.approx(roofline_gemm(H200, case.shape, case.dtype).elapsed, rel=1e-12)


def test_the_backward_pass_is_two_products():
    forward, backward = CASES["prefill-bf16"], CASES["backward-bf16"]
    assert backward.flops == 2 * forward.flops
    assert backward.floor_us(H200) == pytest.approx(2 * forward.floor_us(H200))


def test_a_training_step_is_three_times_the_forward_pass():
    case = CASES["qwen3-train-bf16"]
    assert case.flops == pytest.approx(3 * 2 * 32768 * 8 * 3 * 2048 * 768, rel=1e-3)  # and the sum of combine
    assert CASES["qwen3-train-fp8"].flops == case.flops
    assert CASES["deepseek-train-bf16"].flops == pytest.approx(3 * 2 * 4096 * 8 * 3 * 7168 * 2048, rel=1e-3)


def test_every_bar_can_be_reached_and_its_aim_lies_beyond_it():
    for case in CASES.values():
        goal, floor = case.goal, case.floor_us(H200)
        assert goal.is_met(floor, case.flops)
        assert not goal.is_met(floor * 10, case.flops)
        if goal.aim is not None:
            assert goal.aim < goal.bar if goal.unit == "µs" else goal.aim > goal.bar


def test_goals():
    assert Goal("µs", 32).is_met(32.0, 1)
    assert not Goal("µs", 32).is_met(32.1, 1)
    assert Goal("TFLOP/s", 700).is_met(1.0, 700_000_000)
    assert not Goal("TFLOP/s", 700).is_met(1.0, 699_000_000)

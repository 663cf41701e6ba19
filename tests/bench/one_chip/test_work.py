"""Arithmetic and bytes of the operators, counted by hand."""

from bench.layer import OPERATORS as LAYER_OPERATORS
from bench.one_chip.work import works
from bench.permute import OPERATORS as PERMUTE_OPERATORS
from tests.bench.one_chip.small_cases import small


def test_two_conventions_of_bytes():
    case = small("permute", dtype="fp16")
    rows, token = 64 * 2, 32 * 2
    work = works(case, rows, 4)
    # 2·K·H elements a token for both directions, and 2·(K + 1)·H
    assert work["permute"].bytes_32k == 64 * 2 * 2 * token
    assert work["permute"].bytes_strict == 64 * 2 * 3 * token
    assert work["pack"] == work["dispatch"]
    assert work["pack"].bytes_strict == work["combine"].bytes_strict == 64 * 3 * token
    assert work["top_k"].bytes_32k == work["plan"].bytes_strict == 0
    # Rows that are dropped do not move.
    assert works(case, rows - 10, 4)["pack"].bytes_strict == (64 + rows - 10) * token


def test_arithmetic_of_a_layer():
    work = works(small("layer"), 128, 4)
    assert work["gate_up"].flops == 2 * 128 * 32 * 32
    assert work["down"].flops == 2 * 128 * 16 * 32
    assert work["router"].flops == 2 * 64 * 32 * 4
    stages = ("router", "plan", "dispatch", "gate_up", "down", "combine")
    assert work["layer"].flops == sum(work[name].flops for name in stages)
    assert work["layer"].hbm_bytes == sum(work[name].hbm_bytes for name in stages)


def test_every_operator_has_work():
    assert works(small("layer"), 1, 1).keys() == {*LAYER_OPERATORS, *PERMUTE_OPERATORS}

"""A case is told apart by its key, and by its programs from those that can share them."""

import dataclasses

import pytest

from bench.one_chip.cases import Case
from tests.bench.one_chip.small_cases import small

CHANGES = {
    "tokens": 128,
    "experts": 8,
    "k": 1,
    "hidden": 64,
    "capacity_factor": 2.0,
    "dtype": "bf16",
    "load": "text",
    "text": "book.txt",
    "layouts": ("padded", "compact"),
    "split": (),
    "block": 4,
    "backend": "xla",
    "with_xla": True,
    "seed": 1,
}
ONLY_THE_LOAD = {"capacity_factor", "load", "text", "seed"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_has_another_key(name):
    case = small("permute", dtype="fp32", layouts=("compact", "padded"), split=("compact",))
    other = dataclasses.replace(case, **{name: CHANGES[name]})
    assert case.key != other.key
    assert (case.programs_key == other.programs_key) == (name in ONLY_THE_LOAD)


def test_the_exponent_counts_for_zipf_only():
    assert small("topk", zipf_exponent=2.0).key == small("topk").key
    assert small("topk", zipf_exponent=2.0, load="zipf").key != small("topk", load="zipf").key


def test_capacity_is_that_of_the_mean_load():
    case = small("layer", tokens=100, k=2, experts=4, capacity_factor=1.5)
    assert case.capacity == 75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 8, "length": 9}, "batch × length must be tokens=64, got 8 × 9"),
        ({"batch": 8}, "batch × length must be tokens=64, got 8 × None"),
        ({"split": ("padded",)}, "split must be some of the layouts compact, got"),
        ({"bench": "layer"}, "intermediate must be at least 1, got 0"),
        ({"bench": "gemm"}, "bench must be one of topk, permute, layer, got 'gemm'"),
        ({"load": "uniform"}, "load must be one of balanced, zipf, text, got 'uniform'"),
        ({"zipf_exponent": -1.0}, "zipf exponent must be at least 0, got -1.0"),
        ({"hidden": 3}, "hidden must be at least experts=4, got 3"),
        ({"k": 5}, "k must be at most experts=4, got 5"),
        ({"layouts": ()}, "layouts must be some of compact, padded, block_sparse"),
        ({"layouts": ("dense",)}, "unknown layout 'dense'; expected one of compact, padded, block_sparse"),
        ({"block": 0}, "block must be at least 1, got 0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        Case(**({"bench": "permute", "tokens": 64, "experts": 4, "k": 2, "hidden": 32} | changes))

"""The cases of bench.decoder: their sizes and their arithmetic."""

import pytest

from bench.blocks.cases import CASES, select_cases, with_backend
from moejax import MoEConfig, get_preset
from tests.helpers import raises_saying


def test_sizes_are_those_that_the_names_say():
    shapes = {name: case.shape for name, case in CASES.items()}
    assert shapes["tiny"] == "1x32x256x4x1024"
    assert shapes["bert-base"] == "1x128x768x12x3072"
    assert shapes["bert-large"] == "1x128x1024x16x4096"
    assert shapes["wide-8x64"] == "8x64x2048x32x4096"
    assert shapes["decode-qwen3-30b-a3b-64"] == "64x1x2048x32x128·768, kv 1024"
    assert shapes["decode-deepseek-v3-8"] == "8x1x7168x128x256·2048, kv 1024"
    attention = CASES["decode-qwen3-30b-a3b-8"].block.attention
    assert (attention.num_key_value_heads, attention.head_dim, attention.qk_norm) == (4, 128, True)


def test_flops_by_hand():
    projections, network = 4 * 256 * 256, 3 * 256 * 1024
    pairs = 32 * 33 // 2  # of query and key, in each of four heads of width 64
    assert CASES["tiny"].flops == 2 * 32 * (projections + network) + 2 * 2 * 4 * 64 * pairs
    preset = get_preset("qwen3-30b-a3b")
    projections = 2 * 2048 * (32 * 128) + 2 * 2048 * (4 * 128)
    experts = 8 * 3 * 2048 * preset.intermediate_size + 2048 * 128
    keys = 8 * 1024
    assert CASES["decode-qwen3-30b-a3b-8"].flops == 2 * 8 * (projections + experts) + 2 * 2 * 32 * 128 * keys


def test_precision_and_reduction_are_of_every_case():
    cases = select_cases(["tiny", "decode-deepseek-v3-64"], "w8a8", reduce=True)
    experts = cases["decode-deepseek-v3-64"].block.feed_forward
    assert isinstance(experts, MoEConfig)
    assert (experts.precision, experts.num_experts, experts.router.num_groups) == ("w8a8", 16, 8)
    assert all(case.tokens <= 16 and case.note == "reduced" for case in cases.values())
    with raises_saying(ValueError, "unknown case 'x' in --cases; expected some of tiny, bert-base"):
        select_cases(["x"], "w16a16", reduce=False)


@pytest.mark.parametrize("name", ["auto", "xla"])
def test_backends_are_those_of_both_parts(name):
    block = with_backend(CASES["tiny"], name).block
    assert (block.attention.backend, block.feed_forward.backend) == (name, name)

"""A whole decode step: every figure of DS_TPU's run, the models' data, and a step added up by hand."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.model.decoders import DECODERS, GroupedQueryAttention, get_decoder
from bench.model.layers import step_layers, visible_pairs
from bench.model.shapes import AttentionShape
from bench.model.times import StepTime, model_step
from bench.model.workloads import Workload, moe_workload
from moejax import PRESETS, get_preset
from pallas_kernels.chips import get_chip

EXACT = 1e-14


def workload(name: str, batch_size: int = 1536, ep: int = 32, **settings) -> Workload:
    return moe_workload(get_preset(name), batch_size=batch_size, ep=ep, **settings)


def step(name: str, chip: str, kv_len: int = 8192, **settings) -> StepTime:
    return model_step(get_chip(chip), workload(name, **settings), get_decoder(name), kv_len)


RUN = step("deepseek-v3.2", "v32-run")
LAYERS = {time.layer.name: time for time in RUN.layers}


@pytest.mark.parametrize(
    ("layer", "operator", "shape", "elapsed"),
    [
        ("MLP", "gate_proj", "1,48,7168,18432", 20.125871542857144),
        ("MLP", "up_proj", "1,48,7168,18432", 20.125871542857144),
        ("MLP", "down_proj", "1,48,18432,7168", 20.125871542857144),
        ("MLA", "q_a_proj", "1,48,7168,1536", 1.98954),
        ("MLA", "q_b_proj", "1,48,1536,24576", 6.15515),
        ("MLA", "kv_a_proj", "1,48,7168,576", 0.84608),
        ("MLA", "w_kc", "128,48,128,512", 2.00781),
        ("MLA", "attention", "48,128,2048,576,512", 57.6257340952381),
        ("MLA", "w_vc", "128,48,128,512", 2.00781),
        ("MLA", "o_proj", "1,48,16384,7168", 17.96077),
        ("DSA", "wq_b", "1,48,1536,8192", 2.23457),
        ("DSA", "wk", "1,48,7168,128", 0.25532),
        ("DSA", "weights_proj", "1,48,7168,64", 0.15215),
        ("DSA", "index", "48,64,8192,64,64", 25.697664),
        ("MoE", "gate", "1,48,7168,256", 0.4306371047619048),
        ("MoE", "shared_gate_proj", "1,48,7168,2048", 2.57653),
        ("MoE", "shared_up_proj", "1,48,7168,2048", 2.57653),
        ("MoE", "shared_down_proj", "1,48,2048,7168", 2.57653),
        ("MoE", "routed_gate_proj", "8,48,7168,2048", 17.960774704761906),
        ("MoE", "routed_up_proj", "8,48,7168,2048", 17.960774704761906),
        ("MoE", "routed_down_proj", "8,48,2048,7168", 17.960774704761906),
        ("MoE", "dispatch", "None", 7.057368421052632),
        ("MoE", "combine", "None", 13.52474),
        ("LMHead", "lm_head", "1,48,7168,129280", 138.2146895238095),
    ],
)
def test_operators_of_the_v32_run(layer, operator, shape, elapsed):
    time = {time.name: time for time in LAYERS[layer].operators}[operator]
    assert str(time.shape) == shape
    digits = len(str(elapsed).partition(".")[2])
    assert time.elapsed == pytest.approx(elapsed, rel=EXACT, abs=0 if digits > 6 else 0.51 * 10**-digits)


@pytest.mark.parametrize(
    ("layer", "count", "elapsed", "flops"),
    [
        ("Embedding", 1, 0.08, 88_961_187_840),
        ("MLP", 3, 60.377614628571436, 38_050_725_888),
        ("MLA", 61, 88.5928899047619, 45_342_523_392),
        ("DSA", 61, 28.33971017142857, 7_782_531_072),
        ("MoE", 58, 82.62464271077695, 38_226_886_656),
        ("LMHead", 1, 138.2146895238095, 88_961_187_840),
    ],
)
def test_layers_of_the_v32_run(layer, count, elapsed, flops):
    time = LAYERS[layer]
    assert (time.layer.count, time.total("flops")) == (count, flops)
    assert time.elapsed == pytest.approx(elapsed, rel=EXACT)


def test_totals_of_the_v32_run():
    assert RUN.total("flops") == 5_749_862_301_696
    found = RUN.elapsed, RUN.comm_elapsed, RUN.mfu, RUN.tps, RUN.tps_per_batch, RUN.tps_per_chip
    expected = 12244.545415282206, 1193.762105263158, 0.6114395935561523
    expected += 125443.61165772189, 81.66901800632935, 3920.112864303809
    assert found == pytest.approx(expected, rel=EXACT)
    # The lookup does none of the FLOPs that it is charged with.
    honest = (5_749_862_301_696 - 88_961_187_840) / (12244.545415282206e-6 * 768e12)
    assert RUN.mfu_without_lookup == pytest.approx(honest)
    assert RUN.bound == "compute"


def test_attentions_of_the_v32_run():
    attention, index = (operator for operator in RUN.operators if operator.kind == "attention")
    assert (attention.comp_elapsed, attention.dma_elapsed) == pytest.approx((54.00516266666667, 18.102857142857143))
    assert (index.comp_elapsed, index.dma_elapsed) == pytest.approx((24.118997333333333, 7.893333333333334))
    assert (attention.dram_traffic, index.dram_traffic) == (116_785_152, 50_921_472)
    assert (attention.dram_occupy, index.dram_occupy) == (150_994_944, 25_165_824)
    assert attention.flops == 2 * 48 * 128 * 2048 * (576 + 512)


def test_every_preset_is_a_whole_model():
    assert set(DECODERS) == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("deepseek-v3", 671, 37),
        ("deepseek-v3.2", 671, 37),
        ("kimi-k2", 1026, 32),
        ("mixtral-8x7b", 46.7, 12.9),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-235b-a22b", 235, 22),
        ("gpt-oss-120b", 116.8, 5.1),
        ("llama-4-maverick", 400, 17),
    ],
)
def test_the_parameters_are_as_many_as_each_model_is_said_to_have(name, billions, active):
    """Of the whole model on one chip, and of what one token touches; an embedding's table is active in some counts."""
    layers = step_layers(get_decoder(name), workload(name, batch_size=1, ep=1), kv_len=1)
    total = sum(layer.count * layer.weights for layer in layers)
    assert total == pytest.approx(billions * 1e9, rel=0.02)
    config = PRESETS[name]
    expert = 3 * config.hidden_size * config.intermediate_size
    idle = get_decoder(name).moe_layers * (config.num_experts - config.top_k) * expert
    embedding = layers[0].weights
    assert total - idle - embedding < 1.08 * active * 1e9
    assert total - idle + embedding > 0.95 * active * 1e9


def test_a_step_of_gpt_oss_added_up_by_hand():
    """On H200s at ep 8, 64 sequences with 1024 tokens each, in BF16: memory bounds every operator."""
    bandwidth = 4.8e12

    def product(rows, k, n, groups=1):
        return (groups * k * n + rows * (k + n)) * 2 / bandwidth

    hidden, local = 2880, 8
    projections = 2 * product(local, hidden, 512) + product(local, hidden, 4096) + product(local, 4096, hidden)
    queries_and_output = 2 * local * 64 * 64 * 2 / bandwidth
    windowed, full = (2 * local * 8 * keys * 64 * 2 / bandwidth for keys in (128, 1024))
    time = step("gpt-oss-120b", "h200", kv_len=1024, batch_size=64, ep=8, precision="w16a16")
    rows = 16 * math.ceil(time.workload.busiest_rows / 16)  # 16 experts of a chip, with as many rows each
    experts = product(local, hidden, 128) + 3 * product(rows, hidden, 2880, groups=16)
    sent = math.ceil(time.workload.busiest_rows) * hidden * 2
    exchange = 2 * max(2 * sent / bandwidth, sent * 7 / 8 / 450e9)
    lookup, head = local * hidden * 2 / bandwidth, product(local, hidden, 201088)
    attentions = 36 * (projections + queries_and_output) + 18 * (windowed + full)
    assert time.elapsed == pytest.approx((lookup + attentions + 36 * (experts + exchange) + head) * 1e6)
    assert [layer.bound for layer in time.layers] == ["memory"] * 5
    assert time.cache_bytes == 18 * 2 * local * 8 * (128 + 1024) * 64 * 2
    assert time.fits


@pytest.mark.parametrize("kv_len", [1500, 5000])
def test_a_prefill_of_deepseek_added_up_by_hand(kv_len):
    """Three tokens of each of 64 sequences on eight H200s, eight sequences a chip, with fewer keys than the index picks
    and with more; FP8, as the chip multiplies it."""
    bandwidth, peak = 4.8e12, 1978.9e12
    local, tokens, hidden, heads = 8, 24, 7168, 128

    def roof(flops, num_bytes):
        return max(flops / peak, num_bytes / bandwidth)

    def product(rows, k, n, groups=1):
        padded = -(-rows // 64) * 64  # of each group
        return roof(2 * groups * padded * k * n, groups * (k * n + rows * (k + 2 * n)))

    seen = [min(kv_len - 2 + i, 2048) for i in range(3)]
    attention = roof(
        2 * local * heads * sum(seen) * (576 + 512),
        min(tokens * min(2048, kv_len), local * kv_len) * 576 + tokens * heads * (576 + 2 * 512),
    )
    scores = sum(kv_len - 2 + i for i in range(3))
    index = roof(
        2 * local * 64 * scores * 128,
        local * kv_len * 128 + tokens * 64 * (64 + 2 * 64),
    )
    mla = product(tokens, hidden, 1536) + product(tokens, 1536, heads * 192) + product(tokens, hidden, 576)
    mla += product(tokens, 128, 512, heads) + product(tokens, 512, 128, heads) + product(tokens, heads * 128, hidden)
    dsa = product(tokens, 1536, 64 * 128) + product(tokens, hidden, 128) + product(tokens, hidden, 64)
    mlp = 2 * product(tokens, hidden, 18432) + product(tokens, 18432, hidden)
    time = step("deepseek-v3.2", "h200", kv_len=kv_len, batch_size=64, ep=8, q_len=3)
    rows = math.ceil(time.workload.busiest_rows)
    a_group = -(-rows // 32)  # of 32 experts, all in use
    moe = product(tokens, hidden, 256) + 2 * product(tokens, hidden, 2048) + product(tokens, 2048, hidden)
    moe += 2 * product(a_group, hidden, 2048, 32) + product(a_group, 2048, hidden, 32)
    moe += sum(max(2 * rows * hidden * w / bandwidth, rows * hidden * w * 7 / 8 / 450e9) for w in (1, 2))
    lookup, head = tokens * hidden * 2 / bandwidth, product(tokens, hidden, 129280)
    seconds = lookup + 61 * (mla + attention + dsa + index) + 3 * mlp + 58 * moe + head
    assert time.elapsed == pytest.approx(seconds * 1e6, rel=1e-6)
    assert time.cache_bytes == 61 * local * kv_len * (576 + 128)
    attentions = 61 * (hidden * (1536 + 576) + 1536 * heads * 192 + heads * 2 * 128 * 512 + heads * 128 * hidden)
    indices = 61 * (1536 * 64 * 128 + hidden * (128 + 64))
    experts = 58 * hidden * (256 + 3 * 2048 * (1 + 32))
    assert time.weight_bytes == 2 * 129280 * hidden + attentions + indices + 3 * 3 * hidden * 18432 + experts
    ours, scored = (operator for operator in time.operators if operator.kind == "attention")
    assert min(2048, kv_len) == ours.shape.KS
    assert ours.flops == 2 * tokens * (heads * sum(seen) // 3) * (576 + 512)
    assert scored.flops == 2 * local * 64 * scores * 128
    assert scored.dram_occupy == local * kv_len * 128
    assert time.total("dram_occupy") == sum(
        layer.layer.count * operator.dram_occupy for layer in time.layers for operator in layer.operators
    )


def test_latent_attention_without_an_index():
    """Rows of all tokens of a sequence share its keys, of which each sees those up to itself."""
    time = step("kimi-k2", "b200", kv_len=100, batch_size=16, ep=8, q_len=4)
    attention = next(operator for operator in time.operators if operator.name == "attention")
    shape = attention.shape
    assert (shape.B, shape.QS, shape.KS, shape.keys) == (2, 64 * 4, 100, 200)
    assert attention.flops == 2 * 2 * 64 * (97 + 98 + 99 + 100) * (576 + 512)
    assert attention.dram_traffic == 200 * 576 + 2 * 256 * (576 + 2 * 512)
    assert attention.dram_occupy == 200 * 576


def test_rows_of_an_attention_are_padded_to_the_chip():
    """Eight query heads a cache take as long as 64 on a GPU, and as 32 of 8 bits on a TPU."""
    for chip, rows in (("h200", 64), ("v7x", 32)):
        time = step("qwen3-30b-a3b", chip, ep=8)
        attention = next(operator for operator in time.operators if operator.name == "attention")
        assert attention.shape.QS == 8
        padded = attention.flops * rows / 8
        assert attention.comp_elapsed == pytest.approx(padded / get_chip(chip).peak("float8_e4m3fn") * 1e6)


ATTENTIONS = {
    "deepseek-v3": {(128, 1536, 512, 128, 64, 128, None): 61},
    "deepseek-v3.2": {(128, 1536, 512, 128, 64, 128, (64, 128, 2048)): 61},
    "kimi-k2": {(64, 1536, 512, 128, 64, 128, None): 61},
    "mixtral-8x7b": {(32, 8, 128, None): 32},
    "qwen3-30b-a3b": {(32, 4, 128, None): 48},
    "qwen3-235b-a22b": {(64, 4, 128, None): 94},
    "gpt-oss-120b": {(64, 8, 64, 128): 18, (64, 8, 64, None): 18},
    "llama-4-maverick": {(40, 8, 128, 8192): 36, (40, 8, 128, None): 12},
}
DENSE = {
    "deepseek-v3": (3, 18432),
    "deepseek-v3.2": (3, 18432),
    "kimi-k2": (1, 18432),
    "llama-4-maverick": (24, 16384),
}
VOCABULARIES = {
    "deepseek-v3": 129280,
    "deepseek-v3.2": 129280,
    "kimi-k2": 163840,
    "mixtral-8x7b": 32000,
    "qwen3-30b-a3b": 151936,
    "qwen3-235b-a22b": 151936,
    "gpt-oss-120b": 201088,
    "llama-4-maverick": 202048,
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_those_of_the_published_configurations(name):
    """Heads, ranks, widths, windows and counts, written down a second time."""
    decoder = get_decoder(name)
    found = {dataclasses.astuple(attention): count for attention, count in decoder.attentions.items()}
    assert found == ATTENTIONS[name]
    assert (decoder.dense_layers, decoder.dense_intermediate_size) == DENSE.get(name, (0, 0))
    assert decoder.vocab_size == VOCABULARIES[name]


def test_a_cache_that_is_too_large_does_not_fit():
    assert not step("qwen3-235b-a22b", "h200", kv_len=131072).fits
    nearly = step("kimi-k2", "h200", ep=8, batch_size=256)  # weights alone: 138.6 of 141 GB
    assert not nearly.fits
    assert nearly.weight_bytes < nearly.chip.hbm_bytes
    assert step("kimi-k2", "h200", ep=8, batch_size=8).fits
    assert step("qwen3-235b-a22b", "v32-run", kv_len=131072).fits  # whose memory is not known


def test_real_chips_bring_values_back_from_the_latent_width():
    """DS_TPU charges this product with the extents of the one that goes there: 512 columns written, not 128."""
    shapes = [
        {operator.name: str(operator.shape) for operator in step("deepseek-v3", chip).operators}
        for chip in ("v32-run", "h200")
    ]
    assert [shape["w_kc"] for shape in shapes] == ["128,48,128,512"] * 2
    assert [shape["w_vc"] for shape in shapes] == ["128,48,128,512", "128,48,512,128"]


@pytest.mark.parametrize("chip", ["v32-run", "h200"])
def test_prefill_wider_operands_and_shared_experts_cost_what_they_should(chip):
    name = "deepseek-v3.2"
    decode = step(name, chip)
    prefill = step(name, chip, kv_len=4096, batch_size=64 * 32, q_len=4096)  # DS_TPU's cores share out sequences
    assert prefill.mfu_without_lookup > decode.mfu_without_lookup
    assert prefill.tps > decode.tps
    assert step(name, chip, precision="w16a16").elapsed > 1.4 * decode.elapsed
    split = step(name, chip, ep=16, moe_tp=2)
    assert (split.workload.num_chips, split.workload.dp) == (32, 32)
    shapes = {operator.name: operator.shape for operator in split.operators}
    assert shapes["routed_up_proj"].N == 1024
    assert shapes["q_b_proj"] == {operator.name: operator.shape for operator in decode.operators}["q_b_proj"]
    up = {rounding: step(name, chip, batch_size=32, rounding=rounding) for rounding in ("round", "ceil")}
    assert up["ceil"].elapsed >= up["round"].elapsed


def test_the_roofline_counts_experts_of_tokens_and_ds_tpu_those_of_sequences():
    routed = [
        {operator.name: operator.shape for operator in step("deepseek-v3", chip, batch_size=8, dp=8, q_len=8).operators}
        for chip in ("v32-run", "h200")
    ]
    assert [shapes["routed_up_proj"].G for shapes in routed] == [4, 8]


def test_one_chip_exchanges_nothing():
    for chip in ("v32-run", "h200", "cores=64,tflops=768,gbps=8601.6"):
        time = step("mixtral-8x7b", chip, ep=1, batch_size=8)
        assert time.comm_elapsed == 0
        assert not [operator for operator in time.operators if operator.kind in ("dispatch", "combine")]


def test_a_window_bounds_keys_in_prefill_too():
    windowed = GroupedQueryAttention(heads=8, kv_heads=2, head_dim=16, window=5)
    decoder = dataclasses.replace(get_decoder("mixtral-8x7b"), attentions={windowed: 1})
    layers = step_layers(decoder, workload("mixtral-8x7b", batch_size=3, ep=1, q_len=4), kv_len=9)
    shape = layers[1].operators["attention"]
    assert isinstance(shape, AttentionShape)
    assert (shape.B, shape.QS, shape.KS, shape.keys) == (3 * 2, 4 * 4, 5 + 3, 6 * 8)
    assert shape.pairs == 4 * 4 * 5  # each of four queries of each of four heads sees five
    assert layers[1].cache == 2 * 6 * 8 * 16


@given(q_len=st.integers(1, 40), more=st.integers(0, 40), window=st.none() | st.integers(1, 50))
def test_visible_pairs(q_len, more, window):
    kv_len = q_len + more
    seen = sum(min(place + 1, window or kv_len) for place in range(kv_len - q_len, kv_len))
    assert visible_pairs(q_len, kv_len, window) == seen


@pytest.mark.parametrize(("kv_len", "q_len"), [(0, 1), (7, 8)])
def test_keys_that_are_fewer_than_queries(kv_len, q_len):
    with pytest.raises(ValueError, match=rf"kv_len must .* q_len={q_len}; got {kv_len}"):
        step("mixtral-8x7b", "h200", kv_len=kv_len, ep=8, q_len=q_len)


def test_every_model_on_every_kind_of_chip():
    for name, chip in itertools.product(DECODERS, ("tier6", "v5e", "b200")):
        time = step(name, chip, ep=8)
        assert (
            sum(layer.layer.count for layer in time.layers if layer.layer.name in ("MLP", "MoE"))
            == get_decoder(name).num_layers
        )
        assert all(operator.elapsed > 0 for operator in time.operators)
        assert 0 < time.mfu_without_lookup < 1

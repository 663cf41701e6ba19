import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.model.roofline import least_rows, roofline_exchange, roofline_gemm
from bench.model.shapes import GemmShape
from bench.model.times import model_gemm, model_layer
from bench.model.workloads import Workload
from pallas_kernels.chips import CHIPS, get_chip

DECODE = Workload(7168, 2048, 2048, 256, 8, batch_size=1536, q_len=1, ep=32, dp=32, moe_tp=1)
REAL_CHIPS = [name for name, chip in CHIPS.items() if chip.kind != "ds_tpu"]


def test_memory_bound_product_takes_the_time_of_its_weights():
    chip, shape = get_chip("h200"), GemmShape(8, 48, 7168, 2048)
    time = roofline_gemm(chip, shape, "fp8")
    assert time.dram_traffic == 8 * 7168 * 2048 + 8 * 48 * (7168 + 2 * 2048)
    assert time.elapsed == time.dma_elapsed == pytest.approx(time.dram_traffic / 4.8e12 * 1e6)
    assert time.comp_elapsed == pytest.approx(2 * 8 * 64 * 7168 * 2048 / 1978.9e12 * 1e6)
    assert time.flops == 2 * 8 * 48 * 7168 * 2048
    assert (time.best_tile, time.best_partition) == (None, None)


def test_compute_bound_product_takes_the_time_of_its_arithmetic():
    time = roofline_gemm(get_chip("v6e"), GemmShape(8, 4096, 7168, 4096), "int8")
    assert time.elapsed == time.comp_elapsed == pytest.approx(time.flops / 1836e12 * 1e6)
    assert time.urate == pytest.approx(1)


def test_an_alien_dtype_saves_bytes_and_no_arithmetic():
    chip, shape = get_chip("v6e"), GemmShape(8, 64, 7168, 2048)
    fp8, bf16 = roofline_gemm(chip, shape, "fp8"), roofline_gemm(chip, shape, "bf16")
    assert fp8.comp_elapsed == bf16.comp_elapsed
    assert fp8.dma_elapsed < 0.6 * bf16.dma_elapsed


def test_rows_are_padded_to_the_chip():
    assert least_rows(get_chip("h200"), "fp8") == least_rows(get_chip("b200"), "bf16") == 64
    assert (least_rows(get_chip("v6e"), "int8"), least_rows(get_chip("v7x"), "bf16")) == (32, 16)
    times = [roofline_gemm(get_chip("h200"), GemmShape(8, rows, 7168, 2048), "fp8") for rows in (4, 64, 65)]
    one, same, two = (time.comp_elapsed for time in times)
    assert (same, two) == pytest.approx((one, 2 * one))
    assert times[1].flops == 16 * times[0].flops


@pytest.mark.parametrize(("dtype", "width"), [("fp8", 1), ("int8", 1), ("bf16", 2), ("fp16", 2)])
def test_weights_occupy_bytes(dtype, width):
    time = roofline_gemm(get_chip("h200"), GemmShape(8, 48, 7168, 2048), dtype)
    assert (time.param, time.dram_occupy) == (8 * 7168 * 2048, width * 8 * 7168 * 2048)


def test_exchange_keeps_its_own_share_at_home():
    time = roofline_exchange(get_chip("h200"), "dispatch", 1024 * 7168, ep=8)
    assert time.elapsed == time.link_elapsed == pytest.approx(14.3, abs=0.05)
    alone = roofline_exchange(get_chip("h200"), "dispatch", 1024 * 7168, ep=1)
    assert alone.link_elapsed == 0
    assert alone.elapsed == alone.dma_elapsed > 0


def test_the_chip_picks_the_model():
    shape = GemmShape(8, 48, 7168, 2048)
    assert model_gemm(get_chip("v32-run"), shape, "fp8").best_tile is not None
    assert model_gemm(get_chip("h200"), shape, "fp8").best_tile is None
    assert model_layer(get_chip("v32-run"), DECODE).model == "ds_tpu"
    assert model_layer(get_chip("h200"), DECODE).model == "roofline"


def test_layer_of_the_v32_run():
    layer = model_layer(get_chip("v32-run"), DECODE)
    times = {operator.name: operator for operator in layer.operators}
    assert times["routed_gate_proj"].elapsed == pytest.approx(17.960774704761906, rel=1e-12)
    assert times["gate"].elapsed == pytest.approx(0.4306371047619048, rel=1e-12)
    assert times["dispatch"].elapsed == pytest.approx(7.057368421052632, rel=1e-12)
    assert layer.elapsed == pytest.approx(sum(operator.elapsed for operator in layer.operators))
    assert layer.comm_elapsed == times["dispatch"].elapsed + times["combine"].elapsed
    assert layer.workload.token_per_ep_group == 384
    assert layer.workload.busiest_rows == pytest.approx(424.5, abs=3)


def test_the_roofline_waits_for_the_busiest_chip():
    layer = model_layer(get_chip("h200"), DECODE)
    routed = {operator.name: operator for operator in layer.operators}["routed_gate_proj"]
    assert routed.shape == GemmShape(8, math.ceil(layer.workload.busiest_rows / 8), 7168, 2048)
    assert layer.workload.busiest_rows > layer.workload.token_per_ep_group


@pytest.mark.parametrize("chip", ["v32-run", "h200"])
def test_gradients_of_a_product_multiply_its_result_with_either_operand(chip):
    layer = model_layer(get_chip(chip), DECODE, grad=True)
    place = [operator.name for operator in layer.operators].index("shared_down_proj")
    product, rows, weights, following = layer.operators[place : place + 4]
    assert (product.shape, product.dtype) == (GemmShape(1, 48, 2048, 7168), "fp8")
    assert (rows.shape, rows.dtype) == (GemmShape(1, 48, 7168, 2048), "bf16")
    assert (weights.shape, weights.dtype) == (GemmShape(1, 2048, 48, 7168), "bf16")
    assert following.name == "routed_gate_proj"
    sent = {(operator.name, operator.comm_size) for operator in layer.operators[-4:-2]}
    carried = DECODE.token_per_ep_group if chip == "v32-run" else math.ceil(DECODE.busiest_rows)
    assert sent == {("dispatch", carried * 7168), ("dispatch", 2 * carried * 7168)}


@pytest.mark.parametrize("name", REAL_CHIPS)
def test_roofline_is_never_above_the_sum_of_its_parts(name):
    for precision, quantized in (("w8a8", "fp8"), ("w8a8", "int8"), ("w16a16", "fp8")):
        workload = dataclasses.replace(DECODE, precision=precision, quantized_dtype=quantized)
        for operator in model_layer(get_chip(name), workload).operators:
            parts = operator.comp_elapsed, operator.dma_elapsed, operator.link_elapsed
            assert operator.elapsed == max(parts) > 0


@settings(max_examples=30, deadline=None)
@given(
    shape=st.builds(GemmShape, st.integers(1, 64), st.integers(1, 5000), st.integers(1, 9000), st.integers(1, 9000)),
    dtype=st.sampled_from(["fp8", "int8", "bf16", "fp16"]),
    name=st.sampled_from(REAL_CHIPS),
)
def test_roofline_never_beats_peak_or_compulsory_bytes(shape, dtype, name):
    chip = get_chip(name)
    time = roofline_gemm(chip, shape, dtype)
    assert 0 < time.urate <= 1 + 1e-12
    assert time.dram_traffic > time.dram_occupy
    faster = dataclasses.replace(chip, hbm_bandwidth=2 * chip.hbm_bandwidth)
    assert roofline_gemm(faster, shape, dtype).elapsed <= time.elapsed

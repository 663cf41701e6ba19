"""The table of a run, and the lists of what went wrong."""

import pytest

from bench.hopper.table import ceilings_line, failures, peer_problems, table
from tests.bench.hopper.gpu_records import CEILINGS, measurement, record


@pytest.fixture
def run():
    missing = {"tokamax.ragged_dot": "tokamax is not installed"}
    return record(
        {"decode-fp8": 30.0, "decode-bf16": 61.0, "prefill-fp8-blocks": 1600.0, "down-fp8": "Unsupported: a | b"},
        {
            "decode-fp8": {"torch._scaled_grouped_mm": measurement(63.6)},
            "decode-bf16": {"jax.lax.ragged_dot": measurement(142.0), **missing},
            "down-fp8": {"torch._scaled_grouped_mm": measurement(57.0), **missing},
        },
    )


def test_plain_table(run):
    head, _, decode, bf16, blocks, down = table(run).splitlines()
    assert "torch._scaled_grouped_mm" in head
    assert "tokamax" not in head
    rows = ["|".join(cell.strip() for cell in line.split("  ") if cell) for line in (decode, bf16, blocks, down)]
    assert rows == [
        "decode-fp8|8,48,7168,2048|30.0|4.06 TB/s|87%|≤ 32 µs|≤ 28.5 µs|yes|63.6 (2.12×)|-|1.6e-03",
        "decode-bf16|8,48,7168,2048|61.0|3.97 TB/s|85%|≤ 60 µs|≤ 56 µs|no|-|142.0 (2.33×)|1.6e-03",
        "prefill-fp8-blocks (scales 1x128 and 128x128)|8,4096,7168,4096|1600.0|1203 TFLOP/s|86%"
        "|≥ 1150 TFLOP/s|-|yes|-|-|1.6e-03",
        "down-fp8|8,48,2048,7168|failed|-|-|≤ 34 µs|≤ 30 µs|no|57.0|-|Unsupported: a | b",
    ]


def test_markdown_table(run):
    lines = table(run, markdown=True).splitlines()
    assert lines[0] == "| case | G,M,K,N | µs | rate | of floor | others, µs |"
    assert set(lines[1]) == set("| -")
    assert len(lines) == 2 + 3  # without the case that failed
    assert (
        "| prefill-fp8-blocks: scales 1x128 and 128x128 | 8,4096,7168,4096 | 1600.0 | 1203 TFLOP/s | 86% | - |" in lines
    )


def test_what_the_device_takes_stands_beside_what_the_clock_shows():
    run = record({"qwen3-fp8-1": 41.3})
    run["cases"]["qwen3-fp8-1"]["device_us"] = 25.62
    assert "41.3 (device 25.6)" in table(run)
    assert "| 41.3 (device 25.6) |" in table(run, markdown=True)


def test_failures_name_the_bar(run):
    assert failures(run) == ["decode-bf16: 61.0 µs, the bar is ≤ 60 µs", "down-fp8: Unsupported: a | b"]
    slow = record({"prefill-bf16": 3000.0})
    assert failures(slow) == ["prefill-bf16: 641.4 TFLOP/s, the bar is ≥ 725 TFLOP/s"]
    assert failures(record({"decode-fp8": 32.0})) == []


def test_peers_without_figures(run):
    assert peer_problems(run) == ["tokamax.ragged_dot (decode-bf16, down-fp8): tokamax is not installed"]


def test_ceilings(run):
    line = "reads 4.65 TB/s, cuBLAS 8192³ BF16 794 TFLOP/s"
    assert ceilings_line(run) == f"{line}, FP8 1392 TFLOP/s"
    assert ceilings_line({"ceilings": {**vars(CEILINGS), "fp8_flops": None}}) == line

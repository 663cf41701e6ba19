"""Kernels for Hopper have to compile, their registers have to suffice: interpret mode and lowering know of neither."""

import os
import sys
from pathlib import Path

import pytest

from bench.tpu.libtpu import run_job
from tests.pallas_kernels.hopper_gate import CASES, OVER_TWO_CHIPS

COMPILER = Path(sys.prefix, "cuda")
"""Where `make` puts the compiler for GPUs: a jax that sees it looks for a GPU wherever it starts."""

KERNELS = {
    "every kernel": {
        "gradients of combine": ["combine_dweights", "dispatch"],
        "gradients": ["grouped_matmul", "grouped_matmul_drhs"],
        "gradients in fp8": ["grouped_matmul_drhs_8_bits"],
        "gradients onto sums": ["grouped_matmul_drhs", "grouped_matmul_drhs_8_bits"],
        "serving in fp8": [
            "combine",
            "grouped_gate_up",
            "grouped_matmul",
            "plan_and_dispatch",
            "top_k",
        ],
        "choice within groups": ["top_k"],
        "tokens rounded as they are copied": ["dispatch_rounded"],
        "eight tokens in fp8": ["routed_mlp", "tiles_in_8_bits", "top_k"],
        "exchange": ["all_to_all", "counting_sort", "make_routes"],
        "rms_norm gradients": ["rms_norm", "rms_norm_pullback"],
        "weights in both layouts": ["quantize_transpose"],
        "columns of tokens": ["quantize_columns"],
        "rows": ["quantize_rows"],
        "gated activation": ["gated_activation", "gated_activation_pullback"],
        "gated activation with columns": ["gated_activation_pullback_with_columns"],
    },
    "most registers": {
        "decode fp8": ["grouped_matmul"],
        "prefill fp8 blocks": ["grouped_matmul"],
        "gate/up fp8 blocks": ["grouped_gate_up"],
        "gate/up fp16 K-major": ["grouped_gate_up"],
    },
    "other products": {
        "experts of one token by row": ["routed_mlp"],
        "decode": ["grouped_matmul"],
        "decode down fp8": ["grouped_matmul"],
        "prefill fp8": ["grouped_matmul"],
        "gate/up fp8 to fp8": ["grouped_gate_up"],
        "gate/up with bias": ["grouped_gate_up"],
        "gate/up relu2": ["grouped_gate_up"],
        "gradients in fp8 to float32": ["grouped_matmul_drhs_8_bits"],
        "gradients of many rows onto sums": ["grouped_matmul_drhs", "grouped_matmul_drhs_8_bits"],
        "gradients onto sums in bf16": ["grouped_matmul_drhs", "grouped_matmul_drhs_8_bits"],
        "experts in fp8": [
            "combine",
            "grouped_gate_up",
            "grouped_matmul",
            "plan_and_dispatch",
            "quantize_transpose",
        ],
    },
    "products of few rows": {
        "one row": ["float32_matmul"],
        "one row in bf16": ["float32_matmul"],
        "eight rows": ["float32_matmul"],
        "four rows in bf16": ["float32_matmul"],
        "eight rows, many columns": ["float32_matmul"],
    },
    "dense networks": {
        f"dense network, {rows} rows": ["dense_gate_up", "dense_matmul"] for rows in (16, 64, 128, 256, 512, 1024)
    },
    "norms, weights and activations": {
        "weights in float32": ["quantize_transpose"],
        "weights K-major": ["quantize_transpose"],
        "columns": ["quantize_columns"],
        "columns in float32": ["quantize_columns"],
        "columns 1408": ["quantize_columns"],
        "rows in float32": ["quantize_rows"],
        "rows in float16": ["quantize_rows"],
        "gated activation in float32": ["gated_activation", "gated_activation_pullback"],
        "gated activation 2880": ["gated_activation_pullback"],
        "gated activation with columns, limited": ["gated_activation_pullback_with_columns"],
        "rms_norm 8192": ["rms_norm_pullback"],
        "rms_norm long": ["rms_norm"],
        "rms_norm 2880": ["rms_norm"],
        "rms_norm in blocks": ["rms_norm"],
    },
    "before the one before has ended": {
        "early decode fp8": ["grouped_matmul"],
        "early decode": ["grouped_matmul"],
        "early gate/up fp8 to fp8": ["grouped_gate_up"],
        "early gate/up fp8 blocks": ["grouped_gate_up"],
        "early prefill fp8": ["grouped_matmul"],
        "early rms_norm": ["rms_norm"],
    },
    "a layer's training": {
        "training step": [
            "combine",
            "counting_sort",
            "dispatch",
            "gated_activation_pullback",
            "grouped_matmul",
            "grouped_matmul_drhs",
            "top_k",
        ],
        "training in fp8": [
            "dispatch",
            "gated_activation_pullback",
            "grouped_matmul",
            "quantize_rows",
            "quantize_transpose",
        ],
    },
}
"""The kernels that each case of the gate has."""


@pytest.mark.skipif(not COMPILER.exists(), reason="the compiler for GPUs is not installed (make cuda)")
@pytest.mark.parametrize("part", KERNELS)
@pytest.mark.quick("every kernel")
def test_kernels_compile(part, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(COMPILER), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # which would run candidates
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    answers = run_job("tests.pallas_kernels.hopper_gate", {"cases": list(KERNELS[part])}, timeout=500)
    assert answers == KERNELS[part]


def test_every_case_is_compiled():
    assert {case for part in KERNELS.values() for case in part} == {*CASES, *OVER_TWO_CHIPS}

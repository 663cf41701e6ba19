"""Kernels for Hopper have to compile, their registers have to suffice: interpret mode and lowering know of neither."""

import os
import sys
from pathlib import Path

import pytest

from bench.tpu.libtpu import run_job

COMPILER = Path(sys.prefix, "cuda")
"""Where `make` puts the compiler for GPUs: a jax that sees it looks for a GPU wherever it starts."""

KERNELS = {
    "decode": ["grouped_matmul"],
    "decode fp8": ["grouped_matmul"],
    "decode down fp8": ["grouped_matmul"],
    "prefill fp8": ["grouped_matmul"],
    "prefill fp8 blocks": ["grouped_matmul"],
    "gate/up fp8 to fp8": ["grouped_gate_up"],
    "gate/up fp8 blocks": ["grouped_gate_up"],
    "gate/up fp16 K-major": ["grouped_gate_up"],
    "gate/up with bias": ["grouped_gate_up"],
    "gate/up relu2": ["grouped_gate_up"],
    "gradients": ["grouped_matmul", "grouped_matmul_drhs"],
    "experts in fp8": ["combine", "counting_sort", "dispatch", "grouped_gate_up", "grouped_matmul"],
    "serving in fp8": ["combine", "counting_sort", "dispatch", "grouped_gate_up", "grouped_matmul", "top_k"],
    "training step": [
        "combine",
        "combine_dweights",
        "counting_sort",
        "dispatch",
        "grouped_matmul",
        "grouped_matmul_drhs",
        "top_k",
    ],
}

PARTS = 3


@pytest.mark.skipif(not COMPILER.exists(), reason="the compiler for GPUs is not installed (make cuda)")
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_compile(part, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(COMPILER), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # which would run candidates
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    cases = list(KERNELS)[part::PARTS]
    answers = run_job("tests.pallas_kernels.hopper_gate", {"cases": cases}, timeout=500)
    assert answers == {case: KERNELS[case] for case in cases}

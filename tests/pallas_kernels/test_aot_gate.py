"""Kernels for TPUs have to compile for each of them: interpret mode accepts layouts that the compiler refuses."""

import pytest

from bench.tpu.libtpu import libtpu_version, run_job

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
KERNELS = {
    "each kernel": {
        "dispatch 8 bits": ["dispatch"],
        "in shard_map": ["combine", "combine_dweights", "dispatch", "grouped_matmul", "grouped_matmul_drhs"],
        "gate/up fp8 blocks K-major": ["grouped_gate_up"],
        "all_to_all": ["all_to_all"],
        "combine onto a residual": ["combine"],
        "gradients onto sums": ["grouped_matmul_drhs", "grouped_matmul_drhs_8_bits"],
        "rms_norm gradients": ["rms_norm", "rms_norm_pullback"],
    },
    "others": {
        "gradient of weights in 8 bits": ["grouped_matmul_drhs_8_bits"],
        "gradients onto sums in bf16": ["grouped_matmul_drhs", "grouped_matmul_drhs_8_bits"],
        "rms_norm 2880": ["rms_norm", "rms_norm_pullback"],
        "rms_norm e4m3 blocks": ["rms_norm"],
        "rms_norm e5m2": ["rms_norm"],
        "rms_norm int8": ["rms_norm"],
        "dispatch": ["dispatch"],
        "dispatch float16": ["dispatch"],
        "dispatch 2880": ["dispatch"],
        "dispatch streamed": ["dispatch"],
        "combine": ["combine", "combine_dweights", "dispatch"],
        "matmul gradients": ["grouped_matmul", "grouped_matmul_drhs"],
        "gate/up gradients": ["grouped_matmul", "grouped_matmul_drhs"],
        "gate/up relu2": ["grouped_gate_up"],
        "gate/up K-major": ["grouped_gate_up"],
        "matmul no whole tiles": ["grouped_matmul"],
        "gate/up fp8 blocks": ["grouped_gate_up"],
        "matmul e5m2 by e4m3": ["grouped_matmul"],
        "matmul int8": ["grouped_matmul"],
        "gate/up int8 weights": ["grouped_gate_up"],
    },
    "large": {
        "matmul float32": ["grouped_matmul"],
        "matmul float32, deep": ["grouped_matmul"],
        "matmul 2880": ["grouped_matmul"],
    },
}
"""The kernels that each case of the gate has; the compiler takes as long for the few large ones as for all others."""


@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (EXTRAS=aot)")
@pytest.mark.parametrize("part", KERNELS)
@pytest.mark.quick("each kernel")
def test_kernels_compile(part):
    job = {"topologies": TOPOLOGIES, "cases": list(KERNELS[part])}
    answers = run_job("tests.pallas_kernels.aot_gate", job, timeout=500)
    assert answers == dict.fromkeys(TOPOLOGIES, KERNELS[part])


@pytest.mark.slow
@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (EXTRAS=aot)")
def test_a_training_step_in_8_bits_compiles():
    """All of its products are in FP8 on v7x; elsewhere INT8 forward, BF16 backward."""
    answers = run_job(
        "tests.pallas_kernels.aot_gate", {"topologies": TOPOLOGIES, "cases": ["training step"]}, timeout=500
    )
    moves = ["combine", "dispatch", "grouped_matmul"]
    expected = {topology: {"training step": [*moves, "grouped_matmul_drhs"]} for topology in TOPOLOGIES}
    assert answers == expected | {"tpu7x:2x2x1": {"training step": [*moves, "grouped_matmul_drhs_8_bits"]}}

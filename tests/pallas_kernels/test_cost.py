import jax.numpy as jnp
import pytest

from pallas_kernels import cost
from pallas_kernels.chips import get_chip
from pallas_kernels.cost import Cost


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        # 10 rows, K = 4, N = 6, weights of 2 groups: 480 FLOPs; 48 weights, 40 elements in, 60 out.
        (
            cost.grouped_matmul_cost(10, 4, 6, 2, lhs_dtype="bfloat16", rhs_dtype="bfloat16"),
            Cost(flops=480, hbm_bytes=48 * 2 + 40 * 2 + 60 * 2),
        ),
        (
            cost.grouped_matmul_cost(10, 4, 6, 2, lhs_dtype="float8_e4m3fn", rhs_dtype="int8", out_dtype="float32"),
            Cost(flops=480, hbm_bytes=48 * 1 + 40 * 1 + 60 * 4),
        ),
        # H = 4, I = 3: the same product, of whose 6 columns 3 are written.
        (
            cost.grouped_gate_up_cost(10, 4, 3, 2, lhs_dtype="bfloat16", rhs_dtype="bfloat16"),
            Cost(flops=480, hbm_bytes=48 * 2 + 40 * 2 + 30 * 2),
        ),
        (
            cost.grouped_gate_up_cost(10, 4, 3, 2, lhs_dtype="int8", rhs_dtype="int8", out_dtype="float32"),
            Cost(flops=480, hbm_bytes=48 + 40 + 30 * 4),
        ),
        (cost.grouped_matmul_cost(0, 4, 6, 0, lhs_dtype="int8", rhs_dtype="int8"), Cost()),
        (
            cost.dense_matmul_cost(10, 4, 6, has_residual=True),
            Cost(flops=480, hbm_bytes=24 * 2 + 40 * 2 + 2 * 60 * 2),
        ),
        (
            cost.dense_matmul_cost(10, 4, 3, dtype="float32", gated=True),
            Cost(flops=480, hbm_bytes=24 * 4 + 40 * 4 + 30 * 4),
        ),
        # 5 tokens with 2 choices: 10 ids in, order and inverse out; sizes and offsets of 3 groups.
        (cost.plan_cost(5, 2, 3), Cost(hbm_bytes=4 * (10 + 10 + 10 + 3 + 3))),
        (cost.dispatch_cost(5, 10, 8), Cost(hbm_bytes=5 * 8 * 2 + 10 * 8 * 2 + 10 * 4)),
        (cost.dispatch_cost(5, 10, 8, out_dtype=jnp.float8_e4m3fn), Cost(hbm_bytes=5 * 8 * 2 + 10 * 8 + 10 * 4)),
        (
            cost.combine_cost(5, 10, 8, has_residual=True),
            Cost(flops=160, hbm_bytes=10 * 8 * 2 + 10 * 4 + 10 * 4 + 2 * 5 * 8 * 2),
        ),
        (cost.combine_cost(5, 10, 8), Cost(flops=160, hbm_bytes=10 * 8 * 2 + 10 * 4 + 10 * 4 + 5 * 8 * 2)),
        (
            cost.combine_cost(5, 10, 8, dtype=jnp.float32),
            Cost(flops=160, hbm_bytes=10 * 8 * 4 + 10 * 4 + 10 * 4 + 5 * 8 * 4),
        ),
        (cost.rms_norm_cost(10, 8), Cost(flops=320, hbm_bytes=10 * 8 * 2 + 10 * 8 * 2 + 8 * 4)),
        (
            cost.rms_norm_cost(10, 8, out_dtype="int8", has_residual=True, scales=1),
            Cost(flops=320, hbm_bytes=3 * 10 * 8 * 2 + 10 * 8 + 10 * 4 + 8 * 4),
        ),
        (cost.rms_norm_pullback_cost(10, 8), Cost(flops=800, hbm_bytes=3 * 10 * 8 * 2 + 8 * 4 + 8 * 4)),
        (cost.gated_activation_cost(10, 256), Cost(flops=25600, hbm_bytes=10 * 256 * (2 * 2 + 2))),
        (
            cost.gated_activation_cost(10, 256, dtype="float32", out_dtype=None, in_8_bits=True),
            Cost(flops=25600, hbm_bytes=10 * 256 * (2 * 4 + 1) + 10 * 2 * 4),
        ),
        (
            cost.gated_activation_pullback_cost(10, 256, in_8_bits=True),
            Cost(flops=51200, hbm_bytes=10 * 256 * (3 * 2 + 2 * 2 + 2) + 10 * 4 * 4),
        ),
        (
            cost.gated_activation_pullback_cost(10, 256, with_result="bfloat16"),
            Cost(flops=51200, hbm_bytes=10 * 256 * (3 * 2 + 2 * 2 + 2)),
        ),
        (
            cost.gated_activation_pullback_cost(10, 256, in_8_bits=True, with_array=False, with_columns=True),
            Cost(flops=51200, hbm_bytes=10 * 256 * (3 * 2 + 2 + 3) + 10 * (4 + 6) * 4),
        ),
        (cost.quantize_transpose_cost(3, 128, 256), Cost(flops=196608, hbm_bytes=98304 * 4 + 3 * 2 * 4)),
        (
            cost.quantize_transpose_cost(3, 128, 256, dtype="float32", layouts=1),
            Cost(flops=196608, hbm_bytes=98304 * 5 + 3 * 2 * 4),
        ),
        (cost.quantize_rows_cost(10, 256), Cost(flops=5120, hbm_bytes=10 * 256 * (2 + 1) + 10 * 2 * 4)),
        (
            cost.quantize_rows_cost(10, 256, dtype="float32"),
            Cost(flops=5120, hbm_bytes=10 * 256 * (4 + 1) + 10 * 2 * 4),
        ),
        (
            cost.quantize_columns_cost(100, 300, 256),
            Cost(flops=153600, hbm_bytes=256 * (100 * 2 + 300 + 3 * 4) + 300 * 4),
        ),
    ],
)
def test_hand_computed(actual, expected):
    assert actual == expected


def test_seconds_on_a_chip():
    chip = get_chip("h200")
    work = Cost(flops=1_978_800_000_000, hbm_bytes=9_600_000_000)
    assert work.compute_seconds(chip, "float8_e4m3fn") == pytest.approx(1e-3, rel=1e-3)
    assert work.compute_seconds(chip, "bfloat16") == pytest.approx(2e-3)
    assert work.memory_seconds(chip) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("work", "seconds"), [(Cost(3 * 10**15, 1), 3.033), (Cost(1, 24 * 10**12), 5.0), (Cost(), 0.0)]
)
def test_the_floor_is_the_larger_of_the_two(work, seconds):
    assert work.floor_seconds(get_chip("h200"), "bfloat16") == pytest.approx(seconds, rel=1e-3)


def test_sizes_beyond_32_bits():
    big = cost.grouped_matmul_cost(2**20, 2**13, 2**14, 2**8, lhs_dtype="bfloat16", rhs_dtype="bfloat16")
    assert big.flops == 2**48
    assert big.hbm_bytes == 2 * (2**35 + 2**33 + 2**34)

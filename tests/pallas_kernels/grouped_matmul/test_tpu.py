import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_in_8_bits, grouped_matmul, tpu
from pallas_kernels.grouped_matmul.tpu import drhs, tiling
from pallas_kernels.grouped_matmul.tpu.memory import Config, chunk_lengths
from pallas_kernels.on_tpu.device import cores_of_a_device
from pallas_kernels.quantize import QTensor
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.grouped_matmul.grouped import (
    dense_drhs,
    dense_gate_up,
    dense_matmul,
    operands,
    owned,
    quantized,
    values,
)
from tests.pallas_kernels.kernels_tpu import interpreted

TPUS = ("v5e", "v5p", "v6e", "v7x")

SMALL_TILES = Config(block_m=32, block_n=128, weight_buffers=3, chunk_m=16, chunk_n=128)


def run(function, *args, chip="v6e", config=None, mode="on_wait", **kwargs):
    """`function` as it is for `chip`, on this machine."""
    with targeting(get_chip(chip)), interpreted(dma_execution_mode=mode):
        if config is None:
            return function(*args, backend="pallas_tpu", **kwargs)
        with tiling.forced(config):
            return function(*args, backend="pallas_tpu", **kwargs)


# Strips are 16 rows of BF16: groups begin and end inside of strips, share one, fill one, and lie within one.
RAGGED = [[5, 0, 14, 100, 1, 1, 1, 3], [16, 16, 0, 0, 96, 0, 16, 0], [0, 0, 7, 130, 0, 0, 3, 5], [0] * 8]


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("sizes", RAGGED, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.quick("3-gate_up-[[]0, 0, 7,*eager")
def test_groups_that_share_strips_and_tiles(rng, sizes, fused, buffers, mode):
    lhs, rhs, bias = operands(rng, (160, 64, 512, 8), jnp.bfloat16)
    config = Config(32, 128, buffers, 16, 128)
    function, oracle = (grouped_gate_up, dense_gate_up) if fused else (grouped_matmul, dense_matmul)
    sizes = jnp.asarray(sizes, jnp.int32)
    out = run(function, lhs, rhs, sizes, bias=bias, config=config, mode=mode)
    assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("k_major", [False, True], ids=["", "k_major"])
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.parametrize("depth", [640, 300, 128])
@pytest.mark.quick("640-gate_up-k_major-on_wait")
def test_weights_that_come_in_several_copies(rng, depth, fused, k_major, mode):
    """Parts of unlike lengths, and fewer than copies; scales and bias come beside them."""
    lhs, rhs, bias = operands(rng, (64, depth, 512, 4), jnp.bfloat16)
    rhs = quantized(rhs, "int8", scaling="per_channel")
    config = Config(32, 128, 3, 16, 128, copies=6 if fused else 3)
    function, oracle = (grouped_gate_up, dense_gate_up) if fused else (grouped_matmul, dense_matmul)
    sizes = jnp.asarray([20, 0, 33, 5], jnp.int32)
    weights = rhs.mT if k_major else rhs
    out = run(function, lhs, weights, sizes, bias=bias, config=config, mode=mode, transpose_rhs=k_major)
    assert relative_error(out, oracle(lhs, rhs, sizes, bias)) < 2 * LIMIT["bfloat16"]


@pytest.mark.parametrize(
    ("chip", "halves", "buffers", "copies"),
    [("v6e", 2, 3, 1), ("v7x", 1, 3, 4), ("v7x", 1, 2, 8), ("v7x", 2, 3, 4), ("v7x", 2, 2, 8)],
)
def test_copies_of_a_weight_tile(chip, halves, buffers, copies):
    """On v7x eight at once fill the memory, over the tiles on their way; gate has as many as up."""
    problem = tiling.Problem(384, 8, 2048, 2048, halves, 2, 2, 2, jnp.dtype("bfloat16"), 16)
    assert tiling.copies_of_tile(get_chip(chip), problem, Config(64, 512, buffers, 64, 512)) == copies


@pytest.mark.parametrize("chunk", [64, 128])
@pytest.mark.quick("64")
def test_a_last_chunk_of_every_length(rng, chunk):
    """A group's rows are multiplied in whole chunks and a last one of a quarter, a half or three quarters of it."""
    sizes = [1, 15, 0, 33, 47, 48, 64, 65, 100, 127, 128, 12]
    lhs, rhs, bias = operands(rng, (sum(sizes) + 8, 64, 128, len(sizes)), jnp.bfloat16)
    sizes = jnp.asarray(sizes, jnp.int32)
    out = run(grouped_matmul, lhs, rhs, sizes, bias=bias, config=Config(128, 128, 3, chunk, 128))
    assert relative_error(out, dense_matmul(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]
    assert not np.asarray(out[-8:]).any()


@pytest.mark.parametrize(
    ("chunk", "lengths"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (16, [4, 8, 12, 16])]
)
def test_lengths_of_a_last_chunk(chunk, lengths):
    assert chunk_lengths(chunk, blocks=1) == lengths
    assert chunk_lengths(chunk, blocks=2) == [chunk]


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.quick("v7x")
def test_every_chip_by_its_own_configuration(rng, chip):
    lhs, rhs, bias = operands(rng, (160, 128, 640, 8), jnp.bfloat16)
    sizes = jnp.asarray(RAGGED[0], jnp.int32)
    out = run(grouped_matmul, lhs, rhs, sizes, bias=bias, chip=chip)
    assert relative_error(out, dense_matmul(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]


@pytest.mark.parametrize("columns", [384, 640])
@pytest.mark.quick("384")
def test_two_cores_and_a_narrower_last_column_tile(rng, columns):
    lhs, rhs, bias = operands(rng, (160, 128, columns, 8), jnp.bfloat16)
    sizes = jnp.asarray(RAGGED[0], jnp.int32)
    config = Config(32, 256, 3, 32, 256)
    out = run(grouped_matmul, lhs, rhs, sizes, bias=bias, chip="v5p", config=config)
    assert relative_error(out, dense_matmul(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]


def test_nan_next_door_in_a_strip(rng):
    lhs, rhs, _ = operands(rng, (64, 64, 128, 4), jnp.bfloat16)
    sizes = jnp.asarray([5, 6, 20, 9], jnp.int32)
    lhs, nan = lhs.at[5:11].set(jnp.nan), np.r_[5:11]
    out = np.asarray(run(grouped_matmul, lhs, rhs, sizes, config=SMALL_TILES).astype(jnp.float32))
    assert np.isnan(out[nan]).all()
    clean = dense_matmul(lhs.at[5:11].set(0), rhs, sizes)
    assert relative_error(np.delete(out, nan, 0), np.delete(clean, nan, 0)) < LIMIT["bfloat16"]


@pytest.mark.slow
def test_windows_of_512_groups(rng):
    lhs, rhs, _ = operands(rng, (640, 32, 128, 64), jnp.bfloat16)
    sizes = jnp.asarray(rng.multinomial(600, np.full(512, 1 / 512)), jnp.int32)
    for offset in (0, 200, 448):
        mine = owned(640, sizes, 64, offset)
        poisoned = jnp.where(mine[:, None], lhs, jnp.nan)
        out = run(grouped_matmul, poisoned, rhs, sizes, group_offset=offset)
        assert relative_error(out, dense_matmul(lhs, rhs, sizes, group_offset=offset)) < LIMIT["bfloat16"]


def test_sizes_beyond_the_rows_touch_no_other_memory(rng):
    lhs, rhs, _ = operands(rng, (64, 32, 128, 4), jnp.bfloat16)
    traced = jax.jit(functools.partial(grouped_matmul, backend="pallas_tpu"))
    with interpreted():
        out = traced(lhs, rhs, jnp.asarray([30, -4, 50, 10], jnp.int32))
    assert relative_error(out, dense_matmul(lhs, rhs, [30, 0, 34, 0])) < LIMIT["bfloat16"]


@pytest.mark.parametrize("k_major", [False, True], ids=["", "k_major"])
@pytest.mark.parametrize("chip", ["v6e", "v7x"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.quick("float8_e4m3fn-v7x-k_major")
def test_native_and_converted_dtypes(rng, dtype, chip, k_major):
    lhs, rhs, _ = operands(rng, (96, 256, 256, 4))
    lhs, rhs = quantized(lhs, dtype, scaling="1x128"), quantized(rhs, dtype, scaling="128x128")
    sizes = jnp.asarray([40, 3, 0, 50], jnp.int32)
    out = run(
        grouped_matmul,
        lhs,
        rhs.mT if k_major else rhs,
        sizes,
        chip=chip,
        transpose_rhs=k_major,
        preferred_element_type=jnp.float32,
    )
    assert relative_error(out, dense_matmul(lhs, rhs, sizes)) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("chip", "lhs", "rhs", "expected"),
    [
        ("v6e", "int8", "int8", "int8"),
        ("v7x", "int8", "int8", "bfloat16"),
        ("v6e", "float8_e4m3fn", "float8_e4m3fn", "bfloat16"),
        ("v7x", "float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
        ("v5e", "float8_e5m2", "float8_e5m2", "float8_e5m2"),
        ("v7x", "float8_e5m2", "float8_e4m3fn", "bfloat16"),
        ("v5p", "bfloat16", "int8", "bfloat16"),
        ("v5p", "float32", "int8", "float32"),
    ],
)
def test_the_dtype_that_the_matrix_unit_takes(chip, lhs, rhs, expected):
    def operand(dtype):
        array = jnp.zeros((1, 1), dtype)
        return QTensor(array, jnp.ones((1, 1))) if array.dtype.itemsize == 1 else array

    assert tpu._multiply_dtype(get_chip(chip), operand(lhs), operand(rhs)) == expected


def test_a_scale_that_is_nan_reaches_its_block_only(rng):
    lhs, rhs, _ = operands(rng, (32, 256, 256, 2))
    lhs, rhs = quantized(lhs, scaling="1x128"), quantized(rhs, scaling="128x128")
    poisoned = QTensor(rhs.values, rhs.scale.at[0, 1, 0].set(jnp.nan))
    sizes = jnp.asarray([10, 22], jnp.int32)
    out = np.asarray(run(grouped_matmul, lhs, poisoned, sizes, preferred_element_type=jnp.float32))
    assert np.isnan(out[:10, :128]).all()
    clean = dense_matmul(lhs, rhs, sizes)
    assert relative_error(out[10:], clean[10:]) < LIMIT["float32"]
    assert relative_error(out[:10, 128:], clean[:10, 128:]) < LIMIT["float32"]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.quick("float8_e4m3fn")
def test_a_result_in_8_bits(rng, dtype):
    lhs, rhs, bias = operands(rng, (64, 64, 256, 2), jnp.bfloat16)
    sizes = jnp.asarray([20, 30], jnp.int32)
    out = run(grouped_gate_up_in_8_bits, lhs, rhs, sizes, dtype=dtype, bias=bias)
    assert out.dtype == dtype
    assert out.scale.shape == (64, 1)
    # Half a step of the format: 1/16 for e4m3's three bits of mantissa, relative to each value.
    assert relative_error(values(out), dense_gate_up(lhs, rhs, sizes, bias)) < 1 / 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("blocks", [(32, 128, 128), (64, 256, 128)], ids=str)
@pytest.mark.quick("(32, 128, 128)-bfloat16")
def test_gradient_of_the_weights_in_small_tiles(rng, blocks, dtype):
    lhs, dout = normal(rng, 150, 256, dtype=dtype), normal(rng, 150, 200, dtype=dtype)
    sizes = jnp.asarray([0, 40, 0, 33, 64, 0, 9, 0], jnp.int32)
    lhs, dout = lhs.at[146:].set(jnp.nan), dout.at[146:].set(jnp.nan)
    with interpreted():
        out = drhs.grouped_drhs(
            lhs, dout, sizes, jnp.int32(0), None, 8, jnp.dtype(dtype), drhs.Config(*blocks), vmem_limit_bytes=1 << 24
        )
    # The oracle takes no NaN: rows from 146 on belong to no group.
    ref = dense_drhs(lhs.at[146:].set(0), dout.at[146:].set(0), sizes, 8)
    assert relative_error(out, ref) < LIMIT[dtype]
    assert not np.asarray(out)[np.asarray(sizes) == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
def test_stages_run_and_only_the_whole_gives_the_product(rng, fused):
    lhs, rhs, _ = operands(rng, (96, 64, 512, 4), jnp.bfloat16)
    sizes = jnp.asarray([40, 3, 0, 50], jnp.int32)
    options = dict(bias=None, group_offset=0, transpose_rhs=False, out_dtype=jnp.bfloat16)
    if fused:
        options |= dict(activation="silu", activation_limit=None)
    function, oracle = (tpu.grouped_gate_up, dense_gate_up) if fused else (tpu.grouped_matmul, dense_matmul)
    errors = {}
    for stage in ("full", "comp", "dma"):
        with targeting(get_chip("v6e")), tiling.forced(SMALL_TILES), interpreted():
            out = function(lhs, rhs, sizes, stage=stage, **options)
        errors[stage] = relative_error(out, oracle(lhs, rhs, sizes))
    assert errors["full"] < LIMIT["bfloat16"]
    assert min(errors["comp"], errors["dma"]) > 0.1


@pytest.mark.slow
def test_same_inputs_same_bits_for_every_tiling_of_columns(rng):
    lhs, rhs, bias = operands(rng, (96, 128, 512, 4), jnp.bfloat16)
    sizes = jnp.asarray([40, 3, 0, 50], jnp.int32)
    outs = [
        run(grouped_matmul, lhs, rhs, sizes, bias=bias, config=Config(32, block_n, 3, 32, 128))
        for block_n in (128, 256, 512)
    ]
    assert same_bits(outs[0], outs[1])
    assert same_bits(outs[0], outs[2])


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("rows", "groups", "depth", "columns"),
    [(512, 8, 7168, 2048), (768, 8, 2048, 7168), (32768, 8, 7168, 2048), (65536, 128, 2048, 768), (64, 8, 4096, 14336)],
)
@pytest.mark.quick(
    "32768-8-7168-2048-1-1-v5p",
    "512-8-7168-2048-1-1-v5e",
    "64-8-4096-14336-1-1-v5p",
    "65536-128-2048-768-2-2-v6e",
    "768-8-2048-7168-2-1-v7x",
)
def test_configurations_fit_and_the_model_prefers_them(chip, itemsize, halves, rows, groups, depth, columns):
    chip = get_chip(chip)
    problem = tiling.Problem(
        num_rows=rows,
        num_groups=groups,
        depth=depth,
        columns=columns,
        halves=halves,
        lhs_itemsize=itemsize,
        rhs_itemsize=itemsize,
        out_itemsize=2,
        multiply=jnp.dtype(jnp.bfloat16),
        sublanes=32 // itemsize,
        cores=cores_of_a_device(chip),
    )
    config = tiling.pick(chip, problem)
    assert tiling.fits(chip, problem, config)
    assert tiling.vmem_request(chip, problem, config) <= chip.fast_memory_bytes
    assert config.block_m % problem.sublanes == 0
    assert config.block_m % config.chunk_m == 0
    seconds = tiling.modelled_seconds(chip, problem, config)
    fitting = [c for c in tiling.candidates(problem) if tiling.fits(chip, problem, c)]
    assert seconds == min(tiling.modelled_seconds(chip, problem, c) for c in fitting)
    weights = groups * halves * columns * depth * itemsize / chip.hbm_bandwidth
    arithmetic = 2 * rows * halves * columns * depth / chip.peak("bfloat16")
    floor = max(weights, arithmetic) * chip.cores / problem.cores
    assert floor < seconds < 4 * floor


# K = 384 in 3 blocks of 128. Of 128 lanes each: 200 columns take two, 3 scales of a row one. 3 scales of a column take
# 8 rows, a bias too. Gate and up keep the lhs chunk at 2 bytes an element, and each of its scales as 128 lanes; one
# product keeps those of a block.
@pytest.mark.parametrize(
    ("halves", "kept"), [(2, 32 * (384 * 2 + 3 * 512 + 2 * 2 * 256 * 4)), (1, 32 * (128 * 2 + 512 + 2 * 256 * 4))]
)
def test_vmem_is_counted_in_the_padded_layout(halves, kept):
    problem = tiling.Problem(
        num_rows=256,
        num_groups=4,
        depth=384,
        columns=200,
        halves=halves,
        lhs_itemsize=1,
        rhs_itemsize=1,
        out_itemsize=4,
        multiply=jnp.dtype(jnp.float8_e4m3fn),
        sublanes=32,
        lhs_scales=3,
        rhs_scales=3,
        has_bias=True,
    )
    lhs = 2 * 64 * (384 + 128 * 4)
    rhs = 3 * halves * (384 * 256 + (8 + 8) * 256 * 4)
    out, zeros, shared = 2 * 64 * 256 * 4, 64 * 256 * 4, 32 * 256 * 4
    config = Config(block_m=64, block_n=200, weight_buffers=3, chunk_m=32, chunk_n=200)
    assert tiling.vmem_bytes(problem, config) == lhs + rhs + out + zeros + shared + kept


@pytest.mark.parametrize(("multiply", "bytes_kept"), [("bfloat16", 2), ("float32", 16)])
def test_full_precision_keeps_the_parts_of_every_element(multiply, bytes_kept):
    problem = tiling.Problem(256, 4, 512, 128, 1, 4, 2, 4, jnp.dtype(multiply), 8)
    small, large = (
        tiling.vmem_bytes(problem, Config(block_m=64, block_n=128, weight_buffers=2, chunk_m=rows, chunk_n=128))
        for rows in (32, 64)
    )
    assert large - small == 32 * (512 * bytes_kept + 2 * 128 * 4)


def test_what_the_kernels_refuse():
    sizes = jnp.zeros(2, jnp.int32)
    half = jnp.zeros((16, 128), jnp.float16)
    with raises_saying(Unsupported, "lhs", "float16", "bfloat16 and float32"):
        run(grouped_matmul, half, jnp.zeros((2, 128, 128), jnp.float16), sizes)
    rhs = QTensor(jnp.zeros((2, 128, 128), jnp.int8), jnp.ones((2, 2, 1)))
    with raises_saying(Unsupported, "multiple of 128 deep, got 64", "rhs"):
        run(grouped_matmul, jnp.zeros((16, 128), jnp.bfloat16), rhs, sizes)
    with raises_saying(Unsupported, "N = 100000", "64 MiB", "v7x", "pad N"):
        shape = jax.ShapeDtypeStruct((2, 100000, 100000), jnp.bfloat16)
        rows = jax.ShapeDtypeStruct((16, 100000), jnp.bfloat16)
        jax.eval_shape(lambda a, b: run(grouped_matmul, a, b, sizes, chip="v7x"), rows, shape)
    with raises_saying(Unsupported, "h200"):
        run(grouped_matmul, half, jnp.zeros((2, 128, 128)), sizes, chip="h200")

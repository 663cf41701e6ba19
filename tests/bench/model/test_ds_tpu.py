import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.model import ds_tpu
from bench.model.ds_tpu import best_tile, evaluate_exchange, evaluate_gemm, partitions
from bench.model.operator_time import Tile
from bench.model.shapes import GemmShape
from pallas_kernels.chips import get_chip

# Chip, dtype, shape and parts of the evaluators' published figures; µs elapsed, of arithmetic and of copies; MB.
EXACT = [
    ("seed", "fp8", (8, 48, 7168, 2048), (8, 1, 2, 4), (16.589714285714287, 14.336, 11.268571428571429), 129.236992),
    (
        *("v32-run", "fp8", (8, 48, 7168, 2048), (8, 1, 2, 4)),
        *((17.960774704761906, 14.680064, 15.024761904761904), 129.236992),
    ),
    (
        *("v32-run", "fp8", (1, 48, 7168, 256), (1, 1, 2, 32)),
        *((0.4306371047619048, 0.229376, 0.3847619047619048), 3.309568),
    ),
]
ROUNDED = [
    ("tier6", "bf16", (8, 48, 7168, 2048), (8, 1, 2, 4), ("24.925", "14.680", "21.989"), "252.18"),
    ("tier6", "fp8", (8, 48, 7168, 2048), (8, 1, 2, 4), ("16.93", "14.680", "11.269"), "129.24"),
    ("tier6", "bf16", (4, 1, 7168, 2048), (4, 1, 2, 8), ("10.751", "2.447", "10.261"), "117.686"),
    ("seed", "fp8", (8, 4, 7168, 2048), (8, 1, 2, 4), ("11.2814",), "118.4236"),
]


def figures_of(chip, dtype, shape):
    result = evaluate_gemm(get_chip(chip), GemmShape(*shape), dtype)
    return result.best_partition, (result.elapsed, result.comp_elapsed, result.dma_elapsed), result.dram_traffic


@pytest.mark.parametrize(("chip", "dtype", "shape", "procs", "times", "traffic_mb"), EXACT)
def test_figures_to_all_digits(chip, dtype, shape, procs, times, traffic_mb):
    found_procs, found_times, traffic = figures_of(chip, dtype, shape)
    assert (found_procs, traffic) == (procs, round(traffic_mb * 1e6))
    assert found_times == pytest.approx(times, rel=1e-12)


@pytest.mark.parametrize(("chip", "dtype", "shape", "procs", "times", "traffic_mb"), ROUNDED)
def test_figures_to_the_printed_digits(chip, dtype, shape, procs, times, traffic_mb):
    found_procs, found_times, traffic = figures_of(chip, dtype, shape)
    assert found_procs == procs
    for printed, found in ((traffic_mb, traffic / 1e6), *zip(times, found_times, strict=False)):
        assert f"{found:.{len(printed.partition('.')[2])}f}" == printed


def test_tile_of_the_bf16_example():
    tile = evaluate_gemm(get_chip("tier6"), GemmShape(8, 48, 7168, 2048), "bf16").best_tile
    assert tile == Tile("mnk", M=48, N=1024, K=384)


def test_derived_numbers():
    chip, shape = get_chip("v32-run"), GemmShape(8, 48, 7168, 2048)
    result = evaluate_gemm(chip, shape, "fp8", name="routed_gate_proj")
    assert (result.name, result.kind, result.dtype, result.shape) == ("routed_gate_proj", "matmul", "fp8", shape)
    assert result.flops == 2 * 8 * 48 * 7168 * 2048
    assert result.param == result.dram_occupy == 8 * 7168 * 2048
    assert result.urate == pytest.approx(result.flops / (result.elapsed * 1e-6 * 768e12))
    assert evaluate_gemm(chip, shape, "bf16").dram_occupy == 2 * result.param


def test_exchange_time():
    result = evaluate_exchange(get_chip("v32-run"), "dispatch", 2752512)
    assert result.elapsed == pytest.approx(7.057368421052632, rel=1e-12)
    assert (result.link_elapsed, result.comm_size, result.kind) == (result.elapsed, 2752512, "dispatch")


def test_unknown_dtype_names_the_known_ones():
    with pytest.raises(ValueError, match=r"dtype must be one of fp8, int8, bf16, fp16, got 'fp4'"):
        evaluate_gemm(get_chip("seed"), GemmShape(1, 1, 1, 1), "fp4")


def test_memory_too_small_for_any_tile():
    with pytest.raises(ValueError, match="no tile of a block of 4 rows"):
        best_tile(4, 8, 8, 2, 500)


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (12, 40), (64, 84), (97, 4)])
def test_partitions_cover_every_factorisation(cores, count):
    found = partitions(cores)
    assert len(set(found)) == len(found) == count
    assert all(math.prod(procs) == cores for procs in found)


def by_order(m, n, k, tile, operand_bytes):
    """Bytes of a block in tiles of (M, N, K), by the formulas as they are written down."""
    t_m, t_n, t_k = (math.ceil(extent / size) for extent, size in zip((m, n, k), tile, strict=True))
    a, b, c, spill = m * k * operand_bytes, k * n * operand_bytes, m * n * 2, m * n * 8 * (t_k - 1)
    return {"mnk": a * t_n + b * t_m + c, "nkm": b + a * t_n + spill + c, "mkn": a + b * t_m + spill + c}


def oracle_tile_traffic(m, n, k, operand_bytes, sram_limit):
    """The least traffic over every tile in steps of 16, 8 and 32."""

    def up(x, step):
        return math.ceil(x / step) * step

    k_tiles = [*range(1, 32), *range(32, k, 32), k]
    least = math.inf
    for mt, nt, kt in itertools.product(range(16, up(m, 16) + 1, 16), range(8, up(n, 8) + 1, 8), k_tiles):
        if (up(mt, 16) + up(nt, 16)) * kt * operand_bytes + up(mt, 16) * up(nt * 2, 32) > sram_limit or kt > k:
            continue
        least = min(least, *by_order(m, n, k, (mt, nt, kt), operand_bytes).values())
    return least


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 100),
    n=st.integers(1, 100),
    k=st.integers(1, 200),
    operand_bytes=st.sampled_from([1, 2]),
    sram_limit=st.integers(800, 20_000),
)
def test_tile_search_finds_what_exhaustive_search_finds(m, n, k, operand_bytes, sram_limit):
    tile, traffic = best_tile(m, n, k, operand_bytes, sram_limit)
    assert traffic == oracle_tile_traffic(m, n, k, operand_bytes, sram_limit)
    assert tile.M % 16 == 0
    assert tile.N % 8 == 0
    assert tile.K < 32 or tile.K % 32 == 0 or k == tile.K


@pytest.mark.parametrize(
    ("order", "operands"),
    [
        ("mnk", 64 * 96 * 2 * 2 + 96 * 32 * 2 * 4),
        # One operand comes once a block: B, cut along K only; A, cut along K, and once more for each half of N.
        ("nkm", 64 * 96 * 2 * 2 + 96 * 32 * 2 * 1),
        ("mkn", 64 * 96 * 2 * 2 + 96 * 32 * 2 * 4),
    ],
)
def test_partial_sums_that_leave_fast_memory_are_written_and_read_in_float32(order, operands):
    """4 × 2 tiles of a 64 × 32 result in two blocks of columns, and 3 steps along K = 96."""
    spilled = 0 if order == "mnk" else 64 * 32 * (4 + 4) * 2
    found = ds_tpu._traffic(order, 64, 32, 96, counts=(4, 2, 3), parts=(1, 2, 1), operand_bytes=2)
    assert found == operands + 64 * 32 * 2 + spilled


def oracle_chip_traffic(shape, procs, tile, operand_bytes):
    """Traffic summed core by core, each with its own block."""

    def blocks(extent, parts):
        size = math.ceil(extent / parts)
        return [min(size, extent - start) for start in range(0, extent, size)]

    total = 0
    sizes = [blocks(e, p) for e, p in zip((shape.G, shape.M, shape.N, shape.K), procs, strict=True)]
    for g, m, n, k in itertools.product(*sizes):
        total += g * by_order(m, n, k, (tile.M, tile.N, tile.K), operand_bytes)[tile.order]
    return total


shapes = st.builds(GemmShape, st.integers(1, 9), st.integers(1, 300), st.integers(1, 3000), st.integers(1, 3000))
dtypes = st.sampled_from(["fp8", "bf16"])


@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=dtypes, cores=st.sampled_from([1, 6, 7, 64]))
def test_invariants(shape, dtype, cores):
    chip = get_chip(f"cores={cores},tflops={12 * cores},gbps={134.4 * cores}")
    result = evaluate_gemm(chip, shape, dtype)
    width = 1 if dtype == "fp8" else 2
    assert result.elapsed >= max(result.comp_elapsed, result.dma_elapsed)
    assert result.elapsed <= result.comp_elapsed + result.dma_elapsed
    compulsory = shape.G * ((shape.M * shape.K + shape.K * shape.N) * width + shape.M * shape.N * 2)
    assert result.dram_traffic >= compulsory
    assert result.dma_elapsed >= result.dram_traffic / chip.hbm_bandwidth * 1e6 * (1 - 1e-12)
    assert 0 < result.urate <= 1
    assert result.dram_traffic == oracle_chip_traffic(shape, result.best_partition, result.best_tile, width)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=dtypes, factor=st.floats(1, 8))
def test_more_bandwidth_or_arithmetic_is_never_slower(shape, dtype, factor):
    base = evaluate_gemm(get_chip("v32-run"), shape, dtype).elapsed
    for tflops, gbps in ((768 * factor, 8601.6), (768, 8601.6 * factor)):
        faster = evaluate_gemm(get_chip(f"cores=64,tflops={tflops},gbps={gbps}"), shape, dtype)
        assert faster.elapsed <= base * (1 + 1e-12)


def test_no_partition_beats_the_chosen_one():
    chip, shape = get_chip("v32-run"), GemmShape(3, 40, 700, 900)
    best = evaluate_gemm(chip, shape, "fp8").elapsed
    for g, m, n, k in partitions(64):
        block = (math.ceil(shape.M / m), math.ceil(shape.N / n), math.ceil(shape.K / k))
        groups = math.ceil(shape.G / g)
        _, traffic = best_tile(*block, 1, int(0.45 * chip.fast_memory_bytes))
        macs = math.prod(math.ceil(size / cube) * cube for size, cube in zip(block, (16, 8, 32), strict=True))
        comp, dma = groups * macs / (768e6 / 2 / 64), groups * traffic / (8601.6e3 / 64)
        assert max(comp, dma) + 0.2 * min(comp, dma) >= best * (1 - 1e-12)


def test_search_is_fast():
    best_tile.cache_clear()
    start = time.process_time()
    evaluate_gemm(get_chip("v32-run"), GemmShape(8, 65536, 7168, 4096), "bf16")
    assert time.process_time() - start < 1

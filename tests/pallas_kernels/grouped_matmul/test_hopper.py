"""The Hopper kernels without a GPU: on a simulated one that finds races, and lowered for CUDA."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.grouped_matmul.gpu.hopper import drhs, tiling
from pallas_kernels.grouped_matmul.gpu.hopper import kernel as hopper
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config, Problem
from pallas_kernels.on_gpu.prefetch import Prefetch
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.quantize import dequantize
from tests.helpers import LIMIT, normal, relative_error
from tests.pallas_kernels.grouped_matmul.grouped import dense_drhs, dense_gate_up, dense_matmul, operands, quantized
from tests.pallas_kernels.kernels_gpu import interpreted

SIZES = (5, 0, 70, 1)


@contextlib.contextmanager
def simulated(monkeypatch, config):
    """A GPU of two blocks, in which every kernel is cut as `config` says."""
    monkeypatch.setattr(tiling, "pick", lambda *args, **kwargs: config)
    two_cores = functools.partial(hopper.grouped_product)
    monkeypatch.setattr(
        "pallas_kernels.grouped_matmul.gpu.hopper.grouped_product",
        lambda *args, **kwargs: two_cores(*args, **(kwargs | {"num_blocks": 2})),
    )
    with single_view(True), interpreted():
        yield


CASES = [
    # name, config, fused, K-major, lhs scaling, rhs scaling
    ("bf16", Config(64, 64, 3, 1, 2), False, False, None, None),
    ("bf16-k-major", Config(128, 128, 2, 2, 1), False, True, None, None),
    ("bf16-fused", Config(64, 128, 2, 1, 2), True, True, None, None),
    ("fp8-row-channel", Config(128, 128, 2, 2, 2), False, True, "per_row", "per_channel"),
    ("fp8-tensor", Config(64, 64, 2, 1, 1), False, True, "per_tensor", "per_tensor"),
    ("fp8-blocks", Config(64, 128, 2, 1, 2), False, True, "1x128", "128x128"),
    ("fp8-blocks-fused", Config(64, 128, 2, 1, 2), True, True, "1x128", "128x128"),
    ("bf16-columns", Config(64, 128, 3, 2, 2), False, False, None, None),
    ("bf16-fused-columns", Config(64, 256, 2, 2, 2), True, False, None, None),
    ("fp8-columns", Config(64, 128, 2, 2, 2), False, True, "per_row", "per_channel"),
    ("fp8-blocks-wide", Config(128, 192, 2, 2, 2), False, True, "1x128", "128x128"),
    ("fp8-blocks-fused-columns", Config(64, 256, 2, 2, 1), True, True, "1x128", "128x128"),
]


@pytest.mark.parametrize(
    ("config", "fused", "k_major", "lhs_scaling", "rhs_scaling"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
@pytest.mark.quick("fp8-blocks-wide")
def test_on_a_simulated_gpu(monkeypatch, rng, config, fused, k_major, lhs_scaling, rhs_scaling):
    lhs, rhs, bias = operands(rng, (80, 256, 256, len(SIZES)), jnp.bfloat16)
    lhs = lhs.at[sum(SIZES) :].set(jnp.nan)
    if lhs_scaling:
        lhs = quantized(lhs.at[sum(SIZES) :].set(0), scaling=lhs_scaling)
        rhs = quantized(rhs, scaling=rhs_scaling)
    function, oracle = (grouped_gate_up, dense_gate_up) if fused else (grouped_matmul, dense_matmul)
    run = functools.partial(function, backend="pallas_gpu", transpose_rhs=k_major)
    with simulated(monkeypatch, config):
        out = jax.jit(run)(lhs, rhs.mT if k_major else rhs, jnp.array(SIZES, jnp.int32), bias=bias)
    assert relative_error(out, oracle(lhs, rhs, SIZES, bias)) < LIMIT["bfloat16"]
    assert not np.asarray(out[sum(SIZES) :]).any()


def test_steps_that_are_left_over_on_a_simulated_gpu(monkeypatch, rng):
    """Of five steps with scales of blocks the tensor cores take four at once."""
    lhs, rhs, _ = operands(rng, (80, 640, 128, len(SIZES)), jnp.bfloat16)
    lhs, rhs = quantized(lhs, scaling="1x128"), quantized(rhs, scaling="128x128")
    with simulated(monkeypatch, Config(64, 128, 3, 1, 1)):
        out = grouped_matmul(lhs, rhs.mT, jnp.array(SIZES, jnp.int32), transpose_rhs=True, backend="pallas_gpu")
    assert relative_error(out, dense_matmul(lhs, rhs, SIZES)) < LIMIT["bfloat16"]


AHEAD = [
    # name, config, rows, sizes, N. Two blocks guess that they begin with their own columns of group 0, or where there
    # is one tile of columns, with group 0 and 1.
    ("right", Config(64, 64, 3, 1, 2), 80, SIZES, 128),
    ("whole tile", Config(64, 64, 6, 1, 2), 80, SIZES, 128),
    ("two warpgroups", Config(64, 128, 3, 2, 2), 80, SIZES, 256),
    ("rows of two warpgroups", Config(128, 64, 2, 2, 2), 80, SIZES, 128),
    ("wrong", Config(64, 64, 3, 1, 2), 80, (0, 5, 70, 1), 128),
    ("one right, one wrong", Config(64, 64, 3, 1, 1), 80, SIZES, 64),
    ("no tile for a guess", Config(64, 64, 3, 1, 1), 5, (5, 0), 64),
    ("no guess for a tile", Config(64, 64, 3, 1, 1), 10, (5,), 64),
    ("no rows in any group", Config(64, 64, 3, 1, 1), 10, (0, 0), 64),
]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(("config", "rows", "sizes", "columns"), [c[1:] for c in AHEAD], ids=[c[0] for c in AHEAD])
@pytest.mark.quick("one right, one wrong-0.5")
def test_weights_before_the_wait_on_a_simulated_gpu(monkeypatch, rng, config, rows, sizes, columns, share):
    """Four steps a tile."""
    lhs, rhs, bias = operands(rng, (rows, 512, columns, len(sizes)))
    lhs, rhs = quantized(lhs, scaling="per_row"), quantized(rhs, scaling="per_channel")
    run = functools.partial(grouped_matmul, backend="pallas_gpu", transpose_rhs=True)
    early = dataclasses.replace(config, prefetch=Prefetch("smem", overlap=0.5, prefetch=share))
    with simulated(monkeypatch, early):
        out = jax.jit(run)(lhs, rhs.mT, jnp.array(sizes, jnp.int32), bias=bias)
    assert relative_error(out, dense_matmul(lhs, rhs, sizes, bias)) < LIMIT["bfloat16"]
    assert not np.asarray(out[sum(sizes) :]).any()


@pytest.mark.slow
def test_weights_before_the_wait_with_scales_in_blocks_on_a_simulated_gpu(monkeypatch, rng):
    sizes = 5, 0, 3
    lhs, rhs, bias = operands(rng, (12, 512, 256, len(sizes)))
    lhs, rhs = quantized(lhs, scaling="1x128"), quantized(rhs, scaling="128x128").mT
    run = functools.partial(grouped_gate_up_in_8_bits, transpose_rhs=True)
    arguments = lhs, rhs, jnp.array(sizes, jnp.int32)
    with simulated(monkeypatch, Config(64, 128, 3, 1, 2, prefetch=Prefetch("smem", overlap=1.0, prefetch=1.0))):
        out = jax.jit(functools.partial(run, backend="pallas_gpu"))(*arguments, bias=bias)
    expected = run(*arguments, bias=bias, backend="xla")
    assert relative_error(out.scale, expected.scale) < LIMIT["float32"]
    assert (out.values == expected.values).mean() > 0.999


@pytest.mark.parametrize("num_groups", [40, 64, 150, 256, 300])
@pytest.mark.quick("40")
def test_fewer_rows_than_groups_on_a_simulated_gpu(monkeypatch, rng, num_groups):
    """The last groups have rows too: sizes that were not copied would show."""
    lhs, rhs, _ = operands(rng, (16, 64, 64, num_groups), jnp.bfloat16)
    sizes = np.zeros(num_groups, np.int32)
    sizes[[1, num_groups // 2, num_groups - 2, num_groups - 1]] = 3, 4, 2, 5
    run = functools.partial(grouped_matmul, backend="pallas_gpu")
    with simulated(monkeypatch, Config(64, 64, 2, 1, 1)):
        out = jax.jit(run)(lhs, rhs, jnp.array(sizes))
    assert relative_error(out, dense_matmul(lhs, rhs, sizes)) < LIMIT["bfloat16"]
    assert not np.asarray(out[14:]).any()


@pytest.mark.slow
def test_relu2_on_a_simulated_gpu(monkeypatch, rng):
    lhs, rhs, bias = operands(rng, (80, 128, 256, len(SIZES)), jnp.bfloat16)
    run = functools.partial(grouped_gate_up, activation="relu2", activation_limit=1.0, backend="pallas_gpu")
    with simulated(monkeypatch, Config(64, 128, 2, 1, 2)):
        out = jax.jit(run)(lhs, rhs, jnp.array(SIZES, jnp.int32), bias=bias)
    ref = dense_gate_up(lhs, rhs, SIZES, bias, activation="relu2", limit=1.0)
    assert relative_error(out, ref) < LIMIT["bfloat16"]


@pytest.mark.parametrize(
    ("config", "lhs_scaling", "rhs_scaling"),
    [
        (Config(64, 256, 2, 1, 1), "per_row", "per_channel"),
        (Config(64, 256, 2, 2, 1), "per_row", "per_channel"),
        (Config(64, 128, 3, 1, 2), "per_row", "per_channel"),  # two sweeps, from here on
        (Config(64, 128, 3, 1, 2), "1x128", "128x128"),
        (Config(128, 128, 2, 2, 1), "per_row", "per_channel"),
    ],
    ids=str,
)
@pytest.mark.quick("*warpgroups=1, strip=2, *-1x128-128x128", "*block_n=256, num_stages=2, warpgroups=2*")
def test_result_in_8_bits_on_a_simulated_gpu(monkeypatch, rng, config, lhs_scaling, rhs_scaling):
    lhs, rhs, bias = operands(rng, (80, 512, 512, len(SIZES)))
    lhs, rhs = quantized(lhs, scaling=lhs_scaling), quantized(rhs, scaling=rhs_scaling).mT
    run = functools.partial(grouped_gate_up_in_8_bits, transpose_rhs=True)
    arguments = lhs, rhs, jnp.array(SIZES, jnp.int32)
    with simulated(monkeypatch, config):
        out = jax.jit(functools.partial(run, backend="pallas_gpu"))(*arguments, bias=bias)
    expected = run(*arguments, bias=bias, backend="xla")
    assert out.dtype == expected.dtype
    assert relative_error(out.scale, expected.scale) < LIMIT["float32"]
    # Sums in another order move a value between two numbers of 8 bits to its other neighbour: few do, but one that
    # is large would show in the norm.
    is_same = out.values == expected.values
    steps = jax.lax.bitcast_convert_type(jnp.stack([out.values, expected.values]), jnp.int8).astype(jnp.int32)
    assert is_same.mean() > 0.999
    assert abs(steps[0] - steps[1]).max(where=~is_same, initial=0) <= 1
    assert relative_error(*(jnp.where(is_same, dequantize(x), 0) for x in (out, expected))) < 1e-3


@pytest.mark.slow
def test_window_on_a_simulated_gpu(monkeypatch, rng):
    lhs, rhs, bias = operands(rng, (80, 128, 64, 2), jnp.bfloat16)
    run = functools.partial(grouped_matmul, backend="pallas_gpu", group_offset=1)
    with simulated(monkeypatch, Config(64, 64, 2, 1, 1)):
        out = jax.jit(run)(lhs, rhs, jnp.array(SIZES, jnp.int32), bias=bias)
    assert relative_error(out, dense_matmul(lhs, rhs, SIZES, bias, 1)) < LIMIT["bfloat16"]


@pytest.mark.parametrize(
    ("sizes", "columns", "dtype", "config"),
    [
        (SIZES, 192, "float32", drhs.Config(block_n=64, strip=2)),
        ((5, 0, 203, 64), 192, "float32", drhs.Config(block_n=128, num_stages=2, strip=1, out_slots=2)),
        (SIZES, 320, "bfloat16", drhs.Config()),
        (SIZES, 320, "float32", drhs.Config()),
    ],
    ids=[
        "a step or two",
        "many steps, and few slots for what goes out",
        "a tile at once",
        "a quarter of it at once",
    ],
)
def test_gradient_of_the_weights_on_a_simulated_gpu(sizes, columns, dtype, config, rng):
    rows = -(-sum(sizes) // 8) * 8 + 8
    lhs, dout = normal(rng, rows, 136, dtype=jnp.bfloat16), normal(rng, rows, columns, dtype=jnp.bfloat16)
    lhs, dout = lhs.at[sum(sizes) :].set(jnp.nan), dout.at[sum(sizes) :].set(jnp.nan)
    ends = jnp.cumsum(jnp.array(sizes, jnp.int32))
    run = functools.partial(drhs.grouped_drhs, out_dtype=jnp.dtype(dtype), config=config, num_blocks=2)
    with single_view(True), interpreted():
        out = jax.jit(run)(lhs, dout, ends - jnp.array(sizes), ends, None)
    assert relative_error(out, dense_drhs(lhs, dout, sizes, len(sizes))) < LIMIT[dtype]
    assert not np.asarray(out[1]).any()


TO_8_BITS = Problem("float8_e4m3fn", False, True, True, num_groups=64, num_rows=512, depth=2048, columns=1536)
IN_BLOCKS = dataclasses.replace(TO_8_BITS, block_scales=True)
ALL_CONFIGS = [config for problem in (TO_8_BITS, IN_BLOCKS) for config in tiling.candidates(get_chip("h200"), problem)]


def lowered_for_cuda(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


SHAPES = [  # G, M, K, N
    (8, 384, 7168, 2048),
    (8, 384, 2048, 7168),
    (64, 4096, 2048, 1536),
    (8, 32768, 7168, 4096),
    (512, 512, 2048, 768),
    (32, 2048, 2880, 5760),
]


@pytest.mark.parametrize(("g", "m", "k", "n"), SHAPES)
@pytest.mark.parametrize("operand", ["bfloat16", "float16", "fp8-row-channel", "fp8-blocks"])
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
@pytest.mark.quick(
    "matmul-bfloat16-8-384-7168-2048",
    "gate_up-fp8-blocks-64-4096-2048-1536",
    "matmul-fp8-row-channel-32-2048-2880-5760",
    "gate_up-float16-512-512-2048-768",
)
def test_lowers_for_cuda(g, m, k, n, operand, fused):
    lhs = jax.ShapeDtypeStruct((m, k), "bfloat16" if operand.startswith("fp8") else operand)
    rhs = jax.ShapeDtypeStruct((g, k, n), lhs.dtype)
    scalings = {"fp8-row-channel": ("per_row", "per_channel"), "fp8-blocks": ("1x128", "128x128")}.get(operand)
    if operand == "fp8-blocks" and (k % 128 or n % 256):
        pytest.skip("no whole number of blocks")

    def run(lhs, rhs, sizes, bias):
        if scalings:
            lhs, rhs = (quantized(x, scaling=s) for x, s in zip((lhs, rhs), scalings, strict=True))
            rhs = rhs.mT
        function = grouped_gate_up if fused else grouped_matmul
        return function(lhs, rhs, sizes, bias=bias, backend="pallas_gpu", transpose_rhs=bool(scalings))

    sizes, bias = jax.ShapeDtypeStruct((g,), jnp.int32), jax.ShapeDtypeStruct((g, n), jnp.bfloat16)
    assert "mosaic_gpu" in lowered_for_cuda(run, lhs, rhs, sizes, bias)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"])
@pytest.mark.quick("gelu")
def test_activations_lower_for_cuda(activation):
    def run(lhs, rhs, sizes):
        return grouped_gate_up(lhs, rhs, sizes, activation=activation, activation_limit=7.0, backend="pallas_gpu")

    operands = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1003, 256), (4, 256, 512)))
    assert "mosaic_gpu" in lowered_for_cuda(run, *operands, jax.ShapeDtypeStruct((4,), jnp.int32))


@pytest.mark.parametrize(("lhs_scaling", "rhs_scaling"), [("per_row", "per_channel"), ("1x128", "128x128")])
@pytest.mark.parametrize("config", ["picked", *ALL_CONFIGS], ids=str)
@pytest.mark.quick("picked-1x128-128x128")
def test_a_result_in_8_bits_lowers_for_cuda(config, lhs_scaling, rhs_scaling):
    """With all that shares the memory of a block: scales of rows and columns, bias, scales of the result."""

    def run(lhs, rhs, sizes, bias):
        lhs, rhs = quantized(lhs, scaling=lhs_scaling), quantized(rhs, scaling=rhs_scaling).mT
        return grouped_gate_up_in_8_bits(lhs, rhs, sizes, bias=bias, backend="pallas_gpu", transpose_rhs=True)

    shapes = ((512, 2048), (64, 2048, 1536), (64,), (64, 1536))
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
    problem = IN_BLOCKS if rhs_scaling == "128x128" else TO_8_BITS
    if config != "picked" and not tiling.fits(get_chip("h200"), problem, config):
        pytest.skip("does not fit, as tiling knows")
    with contextlib.nullcontext() if config == "picked" else tiling.forced(config):
        assert "mosaic_gpu" in lowered_for_cuda(run, *arguments)


def test_gradients_lower_for_cuda():
    def loss(lhs, rhs, sizes):
        return grouped_gate_up(lhs, rhs, sizes, backend="pallas_gpu").astype(jnp.float32).sum()

    operands = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1003, 256), (4, 256, 512)))
    text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1)), *operands, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert text.count("mosaic_gpu") >= 3


@pytest.mark.parametrize("rows", [1, 8, 64, 4096])
@pytest.mark.parametrize(("block_scales", "fused"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_configuration_fits(rows, block_scales, fused):
    for operand, columns in (("bfloat16", 2048), ("float8_e4m3fn", 7168)):
        problem = Problem(operand, block_scales, fused, False, 8, num_rows=8 * rows, depth=4096, columns=columns)
        config = tiling.pick(get_chip("h200"), problem)
        assert config.num_stages >= 3
        assert config.block_m in (64, 64 * config.warpgroups)


def test_many_rows_take_large_tiles():
    small, large = (
        tiling.pick(get_chip("h200"), Problem("bfloat16", False, False, False, 8, 8 * rows, 7168, 4096))
        for rows in (48, 4096)
    )
    assert (small.block_m, large.block_m, large.block_n) == (64, 128, 256)


@pytest.mark.parametrize(
    ("lhs", "rhs", "options", "message"),
    [
        (("float32", (64, 64)), ("float32", (2, 64, 64)), {}, "got lhs float32 and rhs float32"),
        (("bfloat16", (64, 64)), ("float16", (2, 64, 64)), {}, "got lhs bfloat16 and rhs float16"),
        (("bfloat16", (64, 60)), ("bfloat16", (2, 60, 64)), {}, "K to be a positive multiple of 8, got 60"),
        (
            ("bfloat16", (64, 64)),
            ("bfloat16", (2, 64, 72)),
            {},
            r"N of rhs .* a positive multiple of 64",
        ),
        (
            ("bfloat16", (64, 64)),
            ("bfloat16", (2, 60, 64)),
            {"transpose_rhs": True},
            "N to be a positive multiple of 8",
        ),
    ],
)
def test_what_the_kernels_refuse(lhs, rhs, options, message):
    lhs, rhs = (jnp.zeros(shape, dtype) for dtype, shape in (lhs, rhs))
    with pytest.raises(Unsupported, match=message):
        grouped_matmul(lhs, rhs, jnp.array([32, 32]), backend="pallas_gpu", **options)


def test_fp8_weights_in_the_wrong_layout(rng):
    lhs, rhs, _ = operands(rng, (64, 128, 128, 2))
    with pytest.raises(Unsupported, match=r"with transpose_rhs=True.*store the weights K-major"):
        grouped_matmul(quantized(lhs), quantized(rhs), jnp.array([32, 32]), backend="pallas_gpu")


def test_scales_that_do_not_fit(rng):
    lhs, rhs, _ = operands(rng, (64, 128, 128, 2))
    with pytest.raises(Unsupported, match=r"per 1x128 block \[M, K/128\], got scale \[64, 4\]"):
        grouped_matmul(
            quantized(lhs, scaling="1x32"),
            quantized(rhs).mT,
            jnp.array([32, 32]),
            backend="pallas_gpu",
            transpose_rhs=True,
        )


@pytest.mark.parametrize(("kind", "capability"), [("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA B200", "10.0")])
def test_a_gpu_that_is_no_hopper(monkeypatch, kind, capability):
    gpu = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr("pallas_kernels.on_gpu.device.jax.devices", lambda: [gpu])
    lhs, rhs = jnp.zeros((64, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), jnp.bfloat16)
    made_for = r"kernels for NVIDIA GPUs are made for Hopper \(compute capability 9.0\)"
    with pytest.raises(Unsupported, match=rf"{made_for}, got {kind} with {capability}"):
        grouped_matmul(lhs, rhs, jnp.array([32, 32]), backend="pallas_gpu")

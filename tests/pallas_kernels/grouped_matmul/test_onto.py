"""Gradients of weights that are added to an array: the bits of the sum, and for gradient refs of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chips import get_chip
from pallas_kernels.columns import first_blocks
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul, grouped_matmul_of_columns
from pallas_kernels.grouped_matmul.gpu.hopper import drhs as drhs_on_gpu
from pallas_kernels.grouped_matmul.gpu.hopper import drhs_8_bits
from pallas_kernels.grouped_matmul.tpu import drhs as drhs_on_tpu
from pallas_kernels.grouped_matmul.tpu import of_columns
from pallas_kernels.on_gpu.smem import SWIZZLE, single_view
from pallas_kernels.quantize import Quantization
from pallas_kernels.quantize_columns import quantize_columns
from pallas_kernels.tracing.target import targeting
from tests.helpers import added_in_refs, additions_to_refs, normal, raises_saying, relative_error, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import dense_drhs, drhs, random_sizes
from tests.pallas_kernels.kernels_gpu import interpreted
from tests.pallas_kernels.kernels_tpu import interpreted as interpreted_on_tpu
from tests.pallas_kernels.kernels_tpu import lower_for_tpu

backend = every_backend("grouped_matmul")

M, K, N = 400, 200, 320
SIZES = (1, 130, 0, 200, 9)
E4M3 = "float8_e4m3fn"


def columns(rng, sizes, shape=(M, 256, 384)):
    m, *features = shape
    return [quantize_columns(normal(rng, m, n), sizes, dtype=E4M3) for n in features]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.quick("xla-float32", "pallas_gpu-*", "pallas_tpu-bfloat16")
def test_a_sum_has_the_bits_of_an_addition(backend, rng, dtype):
    run = jax.jit(functools.partial(drhs, backend, out_dtype=dtype))
    rows = [normal(rng, M, n, dtype="bfloat16") for n in (K, N)]
    for sizes in (SIZES, (0, M, 0), tuple(random_sizes(rng, 5, M))):
        sizes, onto = jnp.array(sizes, jnp.int32), normal(rng, len(sizes), K, N, dtype=dtype)
        lhs, dout = (x.at[sizes.sum() :].set(jnp.nan) for x in rows)  # of no group
        assert same_bits(run(lhs, dout, sizes, onto), onto + run(lhs, dout, sizes))


def test_a_buffer_that_is_needed_is_not_taken(backend, rng):
    lhs, dout = (normal(rng, M, n, dtype="bfloat16") for n in (K, N))
    sizes, onto = jnp.array(SIZES, jnp.int32), normal(rng, len(SIZES), K, N)
    before = np.array(onto)
    out, again = jax.jit(lambda onto: (drhs(backend, lhs, dout, sizes, onto), onto + 1))(onto)
    assert same_bits(onto, before)
    assert same_bits(again, before + 1)
    assert relative_error(out, before + dense_drhs(lhs, dout, sizes, len(SIZES))) < 1e-3


def test_a_window_of_groups(backend, rng):
    lhs, dout = (normal(rng, M, n, dtype="bfloat16") for n in (K, N))
    sizes, onto = jnp.array(SIZES, jnp.int32), normal(rng, len(SIZES), K, N)
    window = drhs(backend, lhs, dout, sizes, onto[1:3], group_offset=jnp.int32(1), num_groups=2)
    assert same_bits(window, drhs(backend, lhs, dout, sizes, onto)[1:3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.quick("xla-float32", "pallas_gpu-*", "pallas_tpu-bfloat16")
def test_a_sum_of_columns_too(backend, rng, dtype):
    run = functools.partial(grouped_matmul_of_columns, preferred_element_type=dtype, backend=backend)
    for sizes in (SIZES, (0, 300, 0)):
        sizes, onto = jnp.array(sizes, jnp.int32), normal(rng, len(sizes), 256, 384, dtype=dtype)
        lhs, dout = columns(rng, sizes)
        assert same_bits(jax.jit(run)(lhs, dout, sizes, onto=onto), onto + jax.jit(run)(lhs, dout, sizes))


def test_without_rows_it_is_what_was_there(backend, rng):
    onto = normal(rng, 2, K, N)
    nothing = jnp.zeros((0, K), jnp.bfloat16), jnp.zeros((0, N), jnp.bfloat16)
    assert same_bits(drhs(backend, *nothing, jnp.zeros(2, jnp.int32), onto), onto)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (drhs_on_gpu.Config(block_n=64, strip=2, out_slots=2), "float32"),
        (drhs_on_gpu.pick(jnp.dtype("float32"), adds=True), "float32"),
        (drhs_on_gpu.pick(jnp.dtype("bfloat16"), adds=True), "bfloat16"),
    ],
    ids=["many tiles", "float32", "bfloat16"],
)
@pytest.mark.quick("many tiles")
def test_rows_on_a_simulated_gpu(rng, config, dtype):
    """A GPU of two blocks that finds races; K is no multiple of a tile."""
    sizes, (lhs, dout) = jnp.array((5, 0, 70, 1), jnp.int32), (normal(rng, 80, n, dtype="bfloat16") for n in (136, 192))
    onto, ends = normal(rng, 4, 136, 192, dtype=dtype), jnp.cumsum(sizes)
    run = jax.jit(functools.partial(drhs_on_gpu.grouped_drhs, out_dtype=jnp.dtype(dtype), config=config, num_blocks=2))
    with single_view(True), interpreted():
        out, plain = (run(lhs, dout, ends - sizes, ends, to) for to in (onto, None))
    assert same_bits(out, onto + plain)


@pytest.mark.parametrize("rows_a_group", [0, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.quick("float32-0")
def test_columns_on_a_simulated_gpu(rng, dtype, rows_a_group):
    sizes = jnp.array((3, 0, 200, 1), jnp.int32)
    lhs, dout = columns(rng, sizes, (256, 256, 136))
    onto, config = normal(rng, 4, 256, 136, dtype=dtype), drhs_8_bits.pick(jnp.dtype(dtype), rows_a_group, adds=True)
    run = functools.partial(drhs_8_bits.grouped_drhs, out_dtype=jnp.dtype(dtype), config=config, num_blocks=2)
    with single_view(True), interpreted():
        out, plain = (jax.jit(run)(lhs, dout, first_blocks(sizes), to) for to in (onto, None))
    assert same_bits(out, onto + plain)


def test_small_tiles_on_a_simulated_tpu(rng):
    sizes, chip, onto = jnp.array((3, 0, 200), jnp.int32), get_chip("v6e"), normal(rng, 3, 256, 384)
    small, out_dtype = drhs_on_tpu.Config(32, 128, 128), jnp.dtype("float32")
    lhs, dout = (normal(rng, 210, n, dtype="bfloat16") for n in (256, 384))
    left, right = columns(rng, sizes, (256, 256, 384))

    def of_rows(onto):
        operands = lhs, dout, sizes, jnp.int32(0), onto, 3
        return drhs_on_tpu.grouped_drhs(*operands, out_dtype, small, vmem_limit_bytes=2**24)

    def of_both_columns(onto):
        operands = left, right, sizes, onto, out_dtype, chip
        return of_columns.grouped_drhs(*operands, vmem_limit_bytes=2**24, largest_tile=128)

    with interpreted_on_tpu(), targeting(chip):
        for run in (of_rows, of_both_columns):
            assert same_bits(run(onto), onto + run(None))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_take_the_buffer(platform):
    sizes, onto = jax.ShapeDtypeStruct((5,), "int32"), jax.ShapeDtypeStruct((5, 256, 384), "float32")
    lhs, dout = (jax.ShapeDtypeStruct((M, n), "bfloat16") for n in (256, 384))
    left, right = jax.eval_shape(lambda x, y, sizes: [quantize_columns(a, sizes) for a in (x, y)], lhs, dout, sizes)
    run = functools.partial(grouped_matmul_of_columns, preferred_element_type="float32")
    for function, *factors in ((functools.partial(drhs, "auto", out_dtype="float32"), lhs, dout), (run, left, right)):
        lower = lower_for_tpu if platform == "tpu" else lowered_for_cuda
        text = lower(lambda *args, f=function: f(*args[:3], onto=args[3]), *factors, sizes, onto).as_text()
        assert "output_operand_alias" in text


def lowered_for_cuda(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


QUANTIZATIONS = {
    "16 bits": None,
    "dx in 8 bits": Quantization(gradient_dtype=E4M3),
    "all in 8 bits": Quantization(gradient_dtype=E4M3, weights_gradient_dtype=E4M3),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "gate_up"])
def test_gradients_go_to_refs(rng, fused, name):
    """Of products, as `pullback.with_refs` asks; JAX adds nothing itself."""
    sizes, x = jnp.array(SIZES, jnp.int32), normal(rng, M, 256, dtype="bfloat16")
    weights = normal(rng, 5, 256, 512, dtype="bfloat16" if name == "16 bits" else "float32") * 0.1
    product = functools.partial(grouped_gate_up if fused else grouped_matmul, quantization=QUANTIZATIONS[name])

    def function(w):
        return product(x, w, sizes)

    dout, onto = normal(rng, M, 256 if fused else 512, dtype="bfloat16"), normal(rng, 5, 256, 512, dtype=weights.dtype)
    gradient = jax.jit(lambda: jax.vjp(function, weights)[1](dout)[0])()
    run = functools.partial(added_in_refs, function, weights, dout)
    assert same_bits(jax.jit(run)(onto), onto + gradient)
    assert not additions_to_refs(run, onto)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_window_of_groups_goes_to_a_ref(rng, name):
    """As the same groups of all do."""
    sizes, x, dout = jnp.array(SIZES, jnp.int32), normal(rng, M, 256, dtype="bfloat16"), normal(rng, M, 128)
    weights, onto = normal(rng, 5, 256, 128), normal(rng, 2, 256, 128)

    def product(w, offset):
        w = w if QUANTIZATIONS[name] else w.astype(jnp.bfloat16)
        options = {"preferred_element_type": jnp.float32, "quantization": QUANTIZATIONS[name]}
        return grouped_matmul(x, w, sizes, group_offset=offset, **options)

    of_all = jax.jit(lambda w: jax.vjp(functools.partial(product, offset=0), w)[1](dout)[0])(weights)
    run = jax.jit(functools.partial(added_in_refs, functools.partial(product, offset=2)))
    assert same_bits(run(weights[2:4], dout, onto), onto + of_all[2:4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slots_hold_all_of_a_tile(dtype):
    dtype = jnp.dtype(dtype)
    for config in (
        drhs_on_gpu.pick(dtype, adds=True),
        drhs_8_bits.pick(dtype, 64, adds=True),
        drhs_8_bits.pick(dtype, 4096, adds=True),
    ):
        assert config.out_slots * SWIZZLE == config.block_n * dtype.itemsize


def test_tiles_on_a_tpu_leave_room_for_what_is_added_to():
    chip, shape, dtype = get_chip("v7x"), (8, 4096, 4096), jnp.dtype("float32")
    alone, added = (drhs_on_tpu.pick(chip, 8192, shape, "bfloat16", dtype, adds=adds) for adds in (False, True))
    assert added.block_k * added.block_n < alone.block_k * alone.block_n


def test_its_derivatives(rng):
    lhs, dout = (normal(rng, M, n) for n in (K, N))
    sizes, onto = jnp.array(SIZES, jnp.int32), normal(rng, 5, K, N)
    moving = [normal(rng, *x.shape) for x in (lhs, dout, onto)]
    run = functools.partial(drhs, "auto", out_dtype="float32")
    plain, tangent = jax.jvp(lambda lhs, dout: run(lhs, dout, sizes, None), (lhs, dout), tuple(moving[:2]))
    total, of_all = jax.jvp(lambda lhs, dout, to: run(lhs, dout, sizes, to), (lhs, dout, onto), tuple(moving))
    assert same_bits(total, onto + plain)
    assert relative_error(of_all, np.asarray(tangent + moving[2])) < 1e-6


def test_what_does_not_fit_is_named(rng):
    sizes = jnp.array(SIZES, jnp.int32)
    for onto in (jnp.zeros((5, 256, 384), jnp.bfloat16), jnp.zeros((5, 256, 128))):
        with raises_saying(ValueError, "onto must be float32[5, 256, 384], got"):
            grouped_matmul_of_columns(*columns(rng, sizes), sizes, preferred_element_type=jnp.float32, onto=onto)

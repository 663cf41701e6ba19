"""Sums over rows in 8 bits: `Columns`, and the product of two of them, here and on a simulated GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.columns import (
    BLOCK,
    Columns,
    first_blocks,
    padded_rows,
)
from pallas_kernels.grouped_matmul import grouped_matmul_of_columns
from pallas_kernels.grouped_matmul.gpu.hopper import drhs_8_bits
from pallas_kernels.grouped_matmul.tpu import of_columns
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.quantize_columns import quantize_columns
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.grouped_matmul.grouped import group_rows, limit_in_8_bits, random_sizes
from tests.pallas_kernels.kernels_gpu import interpreted, lower_for_cuda
from tests.pallas_kernels.kernels_tpu import interpreted as interpreted_on_tpu

backend = every_backend("grouped_matmul")

M, K, N = 400, 384, 256
SIZES = [
    (1, 127, 128, 129, 0),
    (0, 300, 0, 5, 90),
    (0, 0, 400, 0, 0),
    (129, 1, 256, 0, 14),
    (0, 0, 0, 0, 0),
]
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def poisoned(x: jax.Array, sizes: jax.Array, dtype: str) -> Columns:
    """`x` as columns, with NaN in all blocks that no group owns."""
    columns, used = quantize_columns(x, sizes, dtype=dtype), first_blocks(sizes)[-1]
    is_unused = jnp.arange(columns.scale.shape[0]) >= used
    return Columns(
        jnp.where(jnp.repeat(is_unused, BLOCK), jnp.nan, columns.values.astype(jnp.float32)).astype(dtype),
        jnp.where(is_unused[:, None], jnp.nan, columns.scale),
    )


@functools.partial(jax.jit, static_argnames=("shape", "dtypes"))
def made_of(lhs, dout, sizes, *, shape, dtypes=(E4M3, E4M3)):
    """Both operands of a product, of rows of which those past the groups are NaN."""
    is_owned = (jnp.arange(shape[0]) < sizes.sum())[:, None]
    return [
        poisoned(jnp.where(is_owned, x, jnp.nan), sizes, dtype) for x, dtype in zip((lhs, dout), dtypes, strict=True)
    ]


def operands(rng, sizes, shape=(M, K, N), dtypes=(E4M3, E4M3)):
    m, k, n = shape
    steps = np.exp(rng.standard_normal((2, m, 1), np.float32))  # so that the scales of blocks differ
    return made_of(normal(rng, m, k) * steps[0], normal(rng, m, n) * steps[1], sizes, shape=shape, dtypes=dtypes)


def dense(lhs: Columns, dout: Columns, sizes) -> np.ndarray:
    """The product in float64."""
    padded = -(-np.asarray(sizes) // BLOCK) * BLOCK
    left, right = (float64(columns.values).T * np.repeat(float64(columns.scale), BLOCK, 0) for columns in (lhs, dout))
    return np.stack([left[rows].T @ right[rows] for _, rows in group_rows(padded, len(padded))])


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E4M3, E5M2)], ids=["e4m3", "e5m2"])
@pytest.mark.quick("*xla-e4m3-float32", "pallas_gpu-*", "pallas_tpu-e5m2-float32")
def test_the_product(backend, rng, dtypes, out_dtype):
    run = jax.jit(functools.partial(grouped_matmul_of_columns, preferred_element_type=out_dtype, backend=backend))
    for sizes in (*SIZES, random_sizes(rng, 5, M)):
        sizes = jnp.array(sizes)
        lhs, dout = operands(rng, sizes, dtypes=dtypes)
        out = run(lhs, dout, sizes)
        assert out.dtype == out_dtype
        assert relative_error(out, dense(lhs, dout, sizes)) < limit_in_8_bits(backend, out_dtype)
        assert not np.asarray(out)[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E5M2), ("int8", "int8"), (E4M3, E5M2)], ids="-".join)
@pytest.mark.parametrize("chip", ["v6e", "v7x"])
@pytest.mark.quick("v7x-float8_e4m3fn-*n")
def test_tiles_on_a_simulated_tpu(rng, chip, dtypes):
    """Several, the last ones narrower, multiplied in 8 bits where the chip does that and in BF16 elsewhere."""
    sizes, chip = jnp.array([3, 0, 200]), get_chip(chip)
    lhs, dout = operands(rng, sizes, (256, 320, 200), dtypes)
    with interpreted_on_tpu(), targeting(chip):
        out = of_columns.grouped_drhs(
            lhs, dout, sizes, None, jnp.dtype("float32"), chip, vmem_limit_bytes=2**24, largest_tile=128
        )
    assert relative_error(out, dense(lhs, dout, sizes)) < LIMIT["float32"]
    assert not np.asarray(out)[1].any()


CONFIGS = [
    drhs_8_bits.Config(num_stages=2, strip=1),
    drhs_8_bits.Config(warpgroups=2, block_n=192, num_stages=3, strip=2),
]


def simulated(config, out_dtype="float32"):
    return jax.jit(
        functools.partial(
            drhs_8_bits.grouped_drhs, onto=None, out_dtype=jnp.dtype(out_dtype), config=config, num_blocks=2
        )
    )


@pytest.mark.parametrize("config", CONFIGS, ids=["three", "two"])
@pytest.mark.quick("three")
def test_on_a_simulated_gpu(rng, config):
    """A GPU of two blocks that finds races."""
    sizes = jnp.array(SIZES[0] if config.warpgroups == 3 else random_sizes(rng, 5, M))
    lhs, dout = operands(rng, sizes, (M, 256, 136))
    with single_view(True), interpreted():
        out = simulated(config)(lhs, dout, first_blocks(sizes))
    assert relative_error(out, dense(lhs, dout, sizes)) < LIMIT["float32"]
    assert not np.asarray(out)[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("dtypes", [(E4M3, E5M2), (E5M2, E4M3)], ids=["e4m3-e5m2", "e5m2-e4m3"])
@pytest.mark.quick("e4m3-e5m2")
def test_other_dtypes_on_a_simulated_gpu(rng, dtypes):
    sizes = jnp.array([3, 0, 200])
    lhs, dout = operands(rng, sizes, (256, 128, 72), dtypes)
    with single_view(True), interpreted():
        out = simulated(CONFIGS[0], "bfloat16")(lhs, dout, first_blocks(sizes))
    assert relative_error(out, dense(lhs, dout, sizes)) < LIMIT["bfloat16"]


@pytest.mark.slow
def test_a_fault_stays_in_its_group(rng):
    sizes = jnp.array([100, 100])
    lhs, dout = operands(rng, sizes, (256, 128, 128))
    lhs = Columns(lhs.values, lhs.scale.at[0, 5].set(jnp.nan))
    with single_view(True), interpreted():
        out = np.asarray(simulated(CONFIGS[0])(lhs, dout, first_blocks(sizes)))
    assert np.isnan(out[0, 5]).all()
    assert np.isfinite(np.delete(out[0], 5, axis=0)).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("g", "m", "k", "n"), [(128, 262144, 2048, 1536), (32, 32768, 2048, 7168), (2, 200, 136, 72)])
@pytest.mark.quick("128-262144-2048-1536-bfloat16", "2-200-136-72-float32")
def test_lowers_for_cuda(g, m, k, n, out_dtype):
    rows = padded_rows(m, g)
    lhs, dout = (
        Columns(jax.ShapeDtypeStruct((f, rows), dtype), jax.ShapeDtypeStruct((rows // BLOCK, f), "float32"))
        for f, dtype in ((k, E4M3), (n, E5M2))
    )
    run = functools.partial(grouped_matmul_of_columns, preferred_element_type=out_dtype, backend="pallas_gpu")
    lower_for_cuda(run, lhs, dout, jax.ShapeDtypeStruct((g,), "int32"))


def columns(features, rows, dtype=E4M3):
    return Columns(jnp.zeros((features, rows), dtype), jnp.ones((rows // BLOCK, features)))


GOOD = dict(lhs=columns(128, 256), dout=columns(256, 256), group_sizes=jnp.array([130]))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(lhs=jnp.ones((128, 256))), ["lhs", "Columns", "quantize_columns()"]),
        (dict(lhs=columns(128, 200)), ["lhs", "blocks of 128 rows", "[128, 200]"]),
        (dict(dout=Columns(GOOD["dout"].values, jnp.ones((256, 2)))), ["dout", "scale [P/128, F]", "[256, 2]"]),
        (dict(dout=columns(256, 384)), ["same rows", "P = 256 and 384"]),
        (dict(dout=columns(256, 256, "float16")), ["dtype", "float8_e4m3fn", "got float16"]),
        (dict(group_sizes=jnp.ones(2)), ["group_sizes", "integer vector", "float32[2]"]),
        (dict(group_sizes=jnp.zeros(0, int)), ["group_sizes", "not empty"]),
        (dict(group_sizes=jnp.array([129, 1])), ["group_sizes", "fit into 2 blocks of 128 rows", "[129, 1]"]),
        (dict(group_sizes=jnp.array([-1])), ["group_sizes", "at least 0", "[-1]"]),
    ],
)
def test_errors_say_what_was_expected_and_what_came(changes, parts):
    with raises_saying(ValueError, *parts):
        grouped_matmul_of_columns(**(GOOD | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lhs=columns(128, 256, "int8")), "multiply columns in float8_e4m3fn or float8_e5m2, got lhs int8"),
        (dict(dout=columns(60, 256)), "N to be a positive multiple of 8, got 60"),
        (dict(preferred_element_type=jnp.float64), "write bfloat16, float16, float32, got float64"),
    ],
)
def test_what_the_kernel_refuses(changes, message):
    with pytest.raises(Unsupported, match=message):
        grouped_matmul_of_columns(**(GOOD | changes), backend="pallas_gpu")


def test_it_has_no_gradient():
    def loss(scale):
        return grouped_matmul_of_columns(**GOOD | {"lhs": Columns(GOOD["lhs"].values, scale)}).sum()

    with pytest.raises(TypeError, match=r"grouped_matmul\(\) in their place"):
        jax.grad(loss)(GOOD["lhs"].scale)

"""The kernel for Hopper on a machine without one: interpreted; how it is cut; what it refuses."""

import functools
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.dense_matmul import dense_gate_up, dense_matmul, pays
from pallas_kernels.dense_matmul.gpu.kernel import _Scratch
from pallas_kernels.dense_matmul.gpu.problem import Config, Problem
from pallas_kernels.dense_matmul.gpu.sizes import Sizes
from pallas_kernels.dense_matmul.gpu.tiling import candidates, forced, pick
from pallas_kernels.on_gpu.cluster_sum import ClusterSum
from pallas_kernels.on_gpu.smem import single_view
from pallas_kernels.tracing.target import targeting
from tests.helpers import float64, normal, raises_saying, relative_error
from tests.pallas_kernels.dense_matmul.test_dense_matmul import TOLERANCE, expected_gate_up, operands
from tests.pallas_kernels.kernels_gpu import interpreted

H200 = get_chip("h200")


class Meeting:
    """Stands for `ClusterSum`, whose stores into other blocks interpret mode does not have: by way of the host."""

    def __init__(self):
        self._left, self._changed = {}, threading.Condition()

    def sum(self, blocks: ClusterSum, values: list[jax.Array], warpgroup: jax.Array) -> jax.Array:
        tile = [lax.axis_index(axis) for axis in ("column", "row")]
        total = jax.ShapeDtypeStruct(values[0].shape, jnp.float32)
        return io_callback(self._meet, total, jnp.stack(values), lax.axis_index(blocks.axis), *tile, warpgroup)

    def _meet(self, values: jax.Array, rank: jax.Array, *tile: jax.Array) -> np.ndarray:
        rank, tile, blocks = int(rank), tuple(map(int, tile)), range(len(values))
        with self._changed:
            self._left |= {(*tile, to, rank): np.array(values[to]) for to in blocks}
            self._changed.notify_all()
            mine = [(*tile, rank, by) for by in blocks]
            assert self._changed.wait_for(lambda: all(key in self._left for key in mine), timeout=60)
            return np.sum([self._left.pop(key) for key in mine], axis=0)


@pytest.fixture
def sums_by_host(monkeypatch):
    meeting = Meeting()
    monkeypatch.setattr(ClusterSum, "__call__", lambda *args: meeting.sum(*args))


CASES = {
    "one tile": ((128, 192, 128), Config(128, 128, 2)),
    "more": ((200, 200, 192), Config(128, 128, 2)),
    "narrow": ((100, 264, 320), Config(128, 64, 3)),
    "192 columns": ((129, 136, 448), Config(128, 192, 2)),
    "256 columns": ((300, 136, 320), Config(128, 256, 3)),
    "two parts": ((128, 328, 64), Config(128, 128, 2, parts=2)),
    "two parts of many": ((200, 520, 320), Config(128, 128, 2, parts=2)),
    "two parts of 192": ((60, 520, 192), Config(128, 192, 2, parts=2)),
    "four parts": ((60, 520, 128), Config(128, 64, 2, parts=4)),
    "eight parts": ((40, 1160, 128), Config(128, 256, 2, parts=8)),
    "one tile of 64 rows": ((64, 264, 192), Config(64, 64, 3)),
    "several tiles of 64 rows": ((130, 136, 320), Config(64, 128, 2)),
    "one row in four parts": ((1, 1032, 256), Config(64, 128, 3, parts=4)),
    "fewer rows than a tile": ((13, 200, 128), Config(64, 128, 2)),
}


RUNS = [(kind, name) for kind in ("plain", "residual") for name in CASES]
RUNS += [("gated", name) for name, (_, config) in CASES.items() if config.block_n % 128 == 0]


@pytest.mark.usefixtures("sums_by_host")
@pytest.mark.parametrize(("kind", "name"), RUNS)
@pytest.mark.quick(
    "plain-one tile", "plain-192*", "gated-256*", "residual-two parts of many", "residual-fewer*", "plain-eight parts"
)
def test_interpreted(kind, name, rng):
    sizes, config = CASES[name]
    dtype = "float16" if kind == "residual" else "bfloat16"
    windows = 2 if kind == "gated" else 1
    lhs, rhs = operands(rng, *sizes, dtype=dtype, windows=windows)
    residual = normal(rng, sizes[0], sizes[2], dtype=dtype) if kind == "residual" else None
    with interpreted(), single_view(True), forced(config):
        if kind == "gated":
            y = dense_gate_up(lhs, rhs, activation="swigluoai", activation_limit=0.5, backend="pallas_gpu")
            expected = expected_gate_up(lhs, rhs, "swigluoai", 0.5)
        else:
            y = dense_matmul(lhs, rhs, residual=residual, backend="pallas_gpu")
            expected = float64(lhs) @ float64(rhs) + (0 if residual is None else float64(residual))
    assert relative_error(y, expected) < TOLERANCE[dtype]


def test_a_sum_onto_a_residual_is_rounded_once(rng):
    """What a residual that cancels the rounded product leaves is what rounding it took away."""
    lhs, rhs = operands(rng, 70, 128, 64, dtype="float16")
    product = float64(lhs) @ float64(rhs)
    residual = -jnp.asarray(product, "float16")
    with interpreted(), single_view(True), forced(Config(128, 64, 2)):
        y = dense_matmul(lhs, rhs, residual=residual, backend="pallas_gpu")
    assert relative_error(y, product + float64(residual)) < 2e-2


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 128, 200, 256, 512, 1000, 1024, 3000])
@pytest.mark.parametrize(("depth", "columns"), [(8, 64), (768, 2304), (2048, 2048), (4096, 2048), (7168, 18432)])
def test_what_is_picked_fits(rows, depth, columns, windows):
    problem = Problem(rows, depth, columns, windows, windows == 1, jnp.dtype("bfloat16"))
    found = list(candidates(H200, problem))
    assert pick(H200, problem) in found
    for config in found:
        sizes = Sizes(problem, config)
        with single_view(True):
            described = _Scratch.describe(sizes)
        buffers = (
            each for each in (described.lhs, described.rhs, described.out, described.received) if each is not None
        )
        num_bytes = sum(math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in buffers)
        assert num_bytes + 2048 <= H200.fast_memory_bytes
        assert config.num_stages >= 3
        assert config.parts == 1 or problem.steps >= 4 * config.parts
        if config.parts > 1:
            assert described.received.shape[0] == config.warpgroups
            assert described.landed.num_arrivals == config.warpgroups * (config.parts - 1)
        has_one_wave = math.prod(sizes.grid) * config.parts <= H200.cores
        assert config.block_m == 64 if rows <= 64 else config.block_m == 128 or has_one_wave
        assert sizes.out_chunk * 2 in (32, 64, 128)  # of which the copy engine knows how to lay them out
        assert sizes.out_slots * sizes.out_chunk * config.parts * windows == config.block_n


def test_what_is_picked_is_what_was_measured_to_be_fastest():
    """The smallest tiles that make one wave, the largest where none does; parts of K where the smallest make less than
    half a wave, unless to add them up takes longer."""
    measured = {  # block_m, block_n and parts
        (16, 2048, 4096, 2): (64, 128, 1),
        (32, 4096, 2048, 1): (64, 64, 2),
        (64, 4096, 14336, 2): (64, 256, 1),
        (64, 14336, 4096, 1): (64, 64, 2),
        (128, 2048, 2048, 1): (64, 64, 2),
        (128, 2048, 4096, 2): (64, 128, 1),
        (128, 2048, 6144, 1): (64, 128, 1),
        (128, 4096, 14336, 2): (128, 256, 1),
        (128, 14336, 4096, 1): (128, 64, 2),
        (128, 4096, 4096, 1): (64, 64, 1),
        (256, 2048, 2048, 1): (64, 64, 1),
        (256, 2048, 6144, 1): (64, 192, 1),
        (256, 4096, 4096, 1): (64, 128, 1),
        (256, 4096, 14336, 2): (128, 256, 1),
        (512, 2048, 2048, 1): (64, 128, 1),
        (512, 4096, 2048, 1): (64, 128, 1),
        (512, 2048, 4096, 2): (128, 256, 1),
        (512, 2048, 6144, 1): (128, 192, 1),
        (1024, 4096, 2048, 1): (128, 128, 1),
        (1024, 2048, 4096, 2): (128, 256, 1),
    }
    for (rows, depth, columns, windows), best in measured.items():
        config = pick(H200, Problem(rows, depth, columns, windows, windows == 1, jnp.dtype("bfloat16")))
        assert (config.block_m, config.block_n, config.parts) == best


@pytest.mark.parametrize(("rows", "copied"), [(13, 13), (64, 64), (130, 64)])
def test_copies_are_no_higher_than_lhs(rows, copied):
    sizes = Sizes(Problem(rows, 512, 128, 1, False, jnp.dtype("bfloat16")), Config(64, 128, 3))
    assert sizes.lhs_copy_rows == copied
    assert sizes.step_bytes == (copied + 128) * 64 * 2


@pytest.mark.parametrize(("block_m", "warpgroups", "registers"), [(64, 2, 0), (128, 3, 2)])
def test_warpgroups_of_a_block(block_m, warpgroups, registers):
    """One loads; registers are moved to those that multiply where there are two."""
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 512), (512, 128)))
    with targeting(H200), forced(Config(block_m, 64, 3)):
        text = str(jax.make_jaxpr(functools.partial(dense_matmul, backend="pallas_gpu"))(lhs, rhs))
    assert f"num_threads={warpgroups}," in text
    assert text.count("set_max_registers") == registers


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "options", "expected"),
    [
        (15, 1024, 512, {}, False),
        (16, 1024, 512, {}, True),
        (64, 1024, 512, {}, True),
        (65, 1024, 512, {}, False),
        (102, 1024, 512, {}, False),
        (103, 1024, 512, {}, True),
        (192, 1024, 512, {}, False),
        (205, 1024, 512, {}, True),
        (2048, 4096, 14336, {}, True),
        (2049, 1024, 512, {}, False),
        (4000, 1024, 512, {}, False),
        (128, 1016, 512, {}, False),
        (256, 1024, 6144, {"is_bare": True}, True),
        (256, 1024, 6208, {"is_bare": True}, False),
        (256, 1024, 6208, {}, True),
        (384, 1024, 4096, {"is_bare": True}, False),
        (384, 1024, 4096, {}, True),
        (512, 1024, 2048, {"is_bare": True}, True),
        (512, 1024, 2112, {"is_bare": True}, False),
        (512, 1024, 2112, {}, True),
        (512, 1024, 544, {}, False),
        (512, 1028, 512, {}, False),
        (512, 1024, 512, {"dtype": "float32"}, False),
        (0, 1024, 512, {}, False),
        (512, 1024, 512, {"chip": "v6e"}, False),
        (512, 1024, 512, {"chip": "b200"}, False),
    ],
)
def test_where_it_pays(rows, depth, columns, options, expected):
    with targeting(get_chip(options.pop("chip", "h200"))):
        assert pays(rows, depth, columns, **{"dtype": "bfloat16"} | options) == expected


def test_it_pays_for_no_unknown_number_of_rows_and_on_no_cpu():
    (rows,) = jax.export.symbolic_shape("rows")
    with targeting(H200):
        assert not pays(rows, 1024, 512, "bfloat16")
    assert pays(512, 1024, 512, "bfloat16") == (jax.default_backend() == "gpu")


def test_refused(rng):
    with raises_saying(Unsupported, "BF16 and FP16", "float32"):
        dense_matmul(*operands(rng, 8, 64, 32, dtype="float32"), backend="pallas_gpu")
    with raises_saying(Unsupported, "N of 64", "64 and 12"):
        dense_matmul(*operands(rng, 8, 64, 12), backend="pallas_gpu")
    with raises_saying(Unsupported, "K must be a multiple of 8", "12 and 64"):
        dense_matmul(*operands(rng, 8, 12, 64), backend="pallas_gpu")


def test_traced_in_64_bits():
    lhs, rhs = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    with jax.enable_x64(True), targeting(H200):
        traced = jax.make_jaxpr(functools.partial(dense_matmul, backend="pallas_gpu"))(lhs, rhs)
    assert traced.out_avals[0].dtype == jnp.bfloat16


def test_nothing_to_multiply_needs_no_kernel():
    zeros = functools.partial(jnp.zeros, dtype=jnp.bfloat16)
    with interpreted():
        nothing = dense_matmul(zeros((5, 0)), zeros((0, 64)), residual=zeros((5, 64)) + 2, backend="pallas_gpu")
        assert dense_gate_up(zeros((0, 64)), zeros((64, 2, 64)), backend="pallas_gpu").shape == (0, 64)
    assert (nothing == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [Config(128, 64, 8), Config(128, 64, 8, parts=2), Config(128, 128, 4, parts=8), Config(64, 64, 8, parts=2)],
    ids=str,
)
def test_a_thousand_launches_among_buffers_of_nan(config, rng):
    """In a program that XLA may capture, each on rows of its own; blocks of a cluster wait for each other's parts."""
    _, rhs = operands(rng, 1, 2048, 320)

    def agree(key):
        of_lhs, of_residual = jax.random.split(key)
        lhs = jax.random.normal(of_lhs, (200, 2048), rhs.dtype)
        residual = jax.random.normal(of_residual, (200, 320), rhs.dtype)
        (lhs, residual), _ = jax.lax.optimization_barrier(((lhs, residual), jnp.full(1 << 22, jnp.nan)))
        with forced(config):
            y = dense_matmul(lhs, rhs, residual=residual, backend="pallas_gpu").astype(jnp.float32)
        expected = dense_matmul(lhs, rhs, residual=residual, backend="xla").astype(jnp.float32)
        return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)

    errors = jax.jit(lambda keys: jax.lax.map(agree, keys))(jax.random.split(jax.random.key(0), 1000))
    assert (np.asarray(errors) < TOLERANCE["bfloat16"]).all()  # a NaN is not below it

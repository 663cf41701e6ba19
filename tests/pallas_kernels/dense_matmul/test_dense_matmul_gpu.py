"""The kernel for Hopper on a machine without one: interpreted; how it is cut; what it refuses."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from pallas_kernels.chips import get_chip
from pallas_kernels.dense_matmul import dense_gate_up, dense_matmul, gpu
from pallas_kernels.dense_matmul.gpu.sizes import Config, Sizes
from pallas_kernels.dense_matmul.gpu.tiling import candidates, pick
from pallas_kernels.on_gpu.cluster import Exchange
from pallas_kernels.on_gpu.smem import single_view
from tests.helpers import float64, normal, raises_saying, relative_error
from tests.pallas_kernels.dense_matmul.test_dense_matmul import TOLERANCE, expected_gate_up, operands
from tests.pallas_kernels.kernels_gpu import interpreted

H200 = get_chip("h200")


class Meeting:
    """Stands for the exchange between blocks, which interpret mode does not have: by way of the host."""

    def __init__(self):
        self._left, self._changed = {}, threading.Condition()

    def sum(self, exchange: Exchange, values: list[jax.Array], warpgroup: jax.Array) -> jax.Array:
        tile = [lax.axis_index(axis) for axis in ("column", "row")]
        total = jax.ShapeDtypeStruct(values[0].shape, jnp.float32)
        return io_callback(self._meet, total, jnp.stack(values), lax.axis_index(exchange.axis), *tile, warpgroup)

    def _meet(self, values: jax.Array, rank: jax.Array, *tile: jax.Array) -> np.ndarray:
        rank, tile, blocks = int(rank), tuple(map(int, tile)), range(len(values))
        with self._changed:
            self._left |= {(*tile, to, rank): np.array(values[to]) for to in blocks}
            self._changed.notify_all()
            mine = [(*tile, rank, by) for by in blocks]
            assert self._changed.wait_for(lambda: all(key in self._left for key in mine), timeout=60)
            return np.sum([self._left.pop(key) for key in mine], axis=0)


@pytest.fixture(autouse=True)
def exchange_by_host(monkeypatch):
    meeting = Meeting()
    monkeypatch.setattr(Exchange, "sum", lambda *args: meeting.sum(*args))


CASES = {
    "one tile": ((128, 192, 128), Config(128, 2)),
    "more": ((200, 200, 192), Config(128, 2)),
    "narrow": ((100, 264, 320), Config(64, 3)),
    "192 columns": ((129, 136, 448), Config(192, 2)),
    "256 columns": ((300, 136, 320), Config(256, 3)),
    "two parts": ((128, 328, 64), Config(128, 2, parts=2)),
    "two parts of many": ((200, 520, 320), Config(128, 2, parts=2)),
    "two parts of 192": ((60, 520, 192), Config(192, 2, parts=2)),
    "four parts": ((60, 520, 128), Config(64, 2, parts=4)),
    "eight parts": ((40, 1160, 128), Config(256, 2, parts=8)),
}


RUNS = [(kind, name) for kind in ("plain", "residual") for name in CASES]
RUNS += [("gated", name) for name, (_, config) in CASES.items() if config.block_n % 128 == 0]


@pytest.mark.parametrize(("kind", "name"), RUNS)
@pytest.mark.quick("plain-one tile", "plain-192*", "gated-256*", "residual-two parts of many", "plain-eight parts")
def test_interpreted(kind, name, rng):
    sizes, config = CASES[name]
    dtype = "float16" if kind == "residual" else "bfloat16"
    windows = 2 if kind == "gated" else 1
    lhs, rhs = operands(rng, *sizes, dtype=dtype, windows=windows)
    residual = normal(rng, sizes[0], sizes[2], dtype=dtype) if kind == "residual" else None
    with interpreted(), single_view(True), gpu.forced(config):
        if kind == "gated":
            y = dense_gate_up(lhs, rhs, backend="pallas_gpu")
            expected = expected_gate_up(lhs, rhs)
        else:
            y = dense_matmul(lhs, rhs, residual=residual, backend="pallas_gpu")
            expected = float64(lhs) @ float64(rhs) + (0 if residual is None else float64(residual))
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("rows", [1, 64, 128, 200, 256, 512, 1000, 1024, 3000])
@pytest.mark.parametrize(("depth", "columns"), [(8, 64), (768, 2304), (2048, 2048), (4096, 2048), (7168, 18432)])
def test_what_is_picked_fits(rows, depth, columns, windows):
    sizes = Sizes(rows, depth, columns, windows, True, jnp.dtype("bfloat16"), Config(128, 1))
    found = list(candidates(H200, sizes))
    assert pick(H200, sizes) in found
    for cut in found:
        shared_memory = cut.config.num_stages * cut.stage_bytes + cut.other_bytes
        assert shared_memory <= H200.fast_memory_bytes
        assert cut.out_chunk * 2 in (32, 64, 128)  # of which the copy engine knows how to lay them out
        assert cut.out_slots * cut.out_chunk * cut.config.parts * windows == cut.config.block_n


def test_all_multiprocessors_have_work_at_once():
    """As measured: one wave of tiles, of the most columns for which there is one; parts of K where they are too few."""
    measured = {
        (256, 2048, 2048, 1): (64, 2),
        (256, 4096, 2048, 1): (64, 2),
        (256, 2048, 4096, 2): (128, 1),
        (512, 2048, 2048, 1): (64, 1),
        (512, 4096, 2048, 1): (64, 1),
        (512, 2048, 4096, 2): (256, 1),
        (512, 2048, 6144, 1): (192, 1),
        (1024, 4096, 2048, 1): (128, 1),
        (1024, 2048, 4096, 2): (256, 1),
    }
    for (rows, depth, columns, windows), best in measured.items():
        sizes = Sizes(rows, depth, columns, windows, windows == 1, jnp.dtype("bfloat16"), Config(128, 1))
        config = pick(H200, sizes).config
        assert (config.block_n, config.parts) == best


def test_refused(rng):
    with raises_saying(gpu.Unsupported, "BF16 and FP16", "float32"):
        dense_matmul(*operands(rng, 8, 64, 32, dtype="float32"), backend="pallas_gpu")
    with raises_saying(gpu.Unsupported, "N of 64", "64 and 12"):
        dense_matmul(*operands(rng, 8, 64, 12), backend="pallas_gpu")

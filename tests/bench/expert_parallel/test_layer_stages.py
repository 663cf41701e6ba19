"""Clocks of the stages: wall time without a GPU; where there is one (made up here), kernels and their parts."""

import jax
import jax.numpy as jnp
import pytest

from bench.expert_parallel import layer_stages as stages
from bench.expert_parallel.report import stages_record, stages_table
from bench.inputs.weights import make_params
from bench.measure.clock import CallTime
from bench.measure.overlap import OverlapTimes
from moejax import MoEConfig
from pallas_kernels.quantize import Quantization
from sharding.mesh import make_mesh

NAMES = ["gate", "dispatch", "routed_gate_up", "routed_down", "combine"]
PRODUCTS = ["routed_gate_up", "routed_down"]


def times(said, **changes):
    config = MoEConfig(hidden_size=256, intermediate_size=128, num_experts=4, top_k=2, **changes)
    mesh = make_mesh(1, devices=jax.devices("cpu")[:1])
    x = jax.random.normal(jax.random.key(0), (16, 256), jnp.bfloat16)
    return stages.time_stages(x, make_params(config, mesh, 0), config, mesh, said.append)


@pytest.fixture
def nvidia(monkeypatch):
    """Kernels that take 10 µs each time more than the one before."""
    timed = []

    def kernel_times(program, *args, repeats, calls):
        assert calls == 1
        timed.append(program.trace(*args))
        return CallTime.of(
            [10.0 * len(timed)], {"mosaic_gpu_all_to_all": 3.0, "wrapped_add": 2.0, "ncclDevKernel": 1.5}
        )

    monkeypatch.setattr(stages, "is_nvidia", lambda device: True)
    monkeypatch.setattr(stages, "kernel_times", kernel_times)
    return timed


def test_without_a_gpu_all_is_wall_time():
    said = []
    result = times(said)
    assert list(result.seconds) == NAMES
    assert (result.by_kernels, result.overlaps, said) == (set(), {}, [])
    assert list(stages_record(result)) == ["stages_us"]
    assert stages_table(result).splitlines()[0].split() == ["stage,", "run", "by", "itself", "wall", "ms"]


@pytest.mark.parametrize("precision", ["w16a16", "w8a8"])
@pytest.mark.quick("w8a8")
def test_kernel_times_and_their_parts(nvidia, precision):
    said = []
    result = times(said, precision=precision)
    assert said == []
    assert result.by_kernels == set(NAMES) - {"gate"}
    # dispatch, gate/up, its three parts, down, its three, combine
    assert [round(result.seconds[name] * 1e6) for name in NAMES[1:]] == [10, 20, 60, 100]
    assert result.overlaps == {
        "routed_gate_up": OverlapTimes(30.0, 40.0, 50.0),
        "routed_down": OverlapTimes(70.0, 80.0, 90.0),
    }
    gate_up, down = nvidia[2:5], nvidia[6:9]  # whole, arithmetic, copies
    for traced in (gate_up[1], down[0]):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_printed_and_written(nvidia):
    result = times([])
    measured = stages_record(result)
    assert list(measured["stages_us"]) == NAMES
    assert measured["stages_clock"] == {name: "wall" if name == "gate" else "kernels" for name in NAMES}
    assert measured["products_us"]["routed_gate_up"] == {
        "elapsed": 30.0,
        "comp_elapsed": 40.0,
        "dma_elapsed": 50.0,
        "overlap": 1.5,
    }
    rows = {line.split()[0]: line.split()[1:] for line in stages_table(result).splitlines()}
    assert measured["link_us"] == {"dispatch": 4.5, "combine": 4.5}
    assert rows["routed_gate_up"] == ["-", "0.020", "30.000", "40.000", "50.000", "1.500", "-"]
    assert rows["combine"] == ["-", "0.100", "-", "-", "-", "-", "4.500"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "xla"}, "backend xla is not the Hopper kernel"),
        ({"precision": "w8a8", "quantization": Quantization(dtype="int8")}, "Hopper kernels multiply"),
    ],
)
@pytest.mark.quick("changes1-*")
def test_products_without_a_kernel_are_told(nvidia, changes, reason):
    said = []
    result = times(said, **changes)
    assert result.overlaps == dict.fromkeys(PRODUCTS)
    assert len(said) == 2
    assert all(reason in line for line in said)
    assert stages_record(result)["products_us"] == dict.fromkeys(PRODUCTS)


def test_wall_times_where_the_driver_gives_no_kernel_times(nvidia, monkeypatch):
    def kernel_times(program, *args, repeats, calls):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(stages, "kernel_times", kernel_times)
    said = []
    result = times(said)
    assert list(result.seconds) == NAMES
    assert (result.by_kernels, result.overlaps) == (set(), {})
    assert said == ["wall times in place of kernel times: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"]

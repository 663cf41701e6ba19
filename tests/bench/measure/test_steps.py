"""Steps are compiled once, run in order, and measured in turn; on a GPU (made up here) on copies of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.measure import steps
from bench.measure.clock import CallTime
from bench.measure.steps import Step, StepTimer

STEPS = [
    Step("double", lambda x: 2 * x, ("x",)),
    Step("prepare", lambda x: x + 1, ("x",), is_timed=False),
    Step("sum", lambda a, b: (a + b, a.sum()), ("double", "prepare")),
]


@pytest.fixture
def x():
    return jnp.arange(6, dtype=jnp.float32)


def test_values_samples_and_memory(x):
    measured = StepTimer().measure(STEPS, {"x": x}, scope="a", rounds=3)
    total, of_twice = measured.values["sum"]
    np.testing.assert_array_equal(total, 3 * np.arange(6) + 1)
    assert of_twice == 30
    assert measured.samples_us.keys() == {"double", "sum"}
    for samples in measured.samples_us.values():
        assert len(samples) == 3
        assert all(0 < s < 1e6 for s in samples)
    assert measured.program_bytes["double"] >= 2 * x.nbytes
    assert measured.program_bytes["sum"] >= 3 * x.nbytes


def test_a_cpu_has_the_wall_clock():
    assert StepTimer().name == "wall"


def test_programs_are_used_again_until_the_scope_changes(x):
    traced = []

    def doubling():
        def double(x):
            traced.append(x.shape)
            return 2 * x

        return [Step("double", double, ("x",))]

    clock = StepTimer()
    clock.measure(doubling(), {"x": x}, scope="a", rounds=1)
    measured = clock.measure(doubling(), {"x": x + 1}, scope="a", rounds=1)
    np.testing.assert_array_equal(measured.values["double"], 2 * np.arange(1, 7))
    assert traced == [(6,)]
    clock.measure(doubling(), {"x": x[:3]}, scope="a", rounds=1)
    assert traced == [(6,), (3,)]
    clock.measure(doubling(), {"x": x}, scope="b", rounds=1)
    assert traced == [(6,), (3,), (6,)]


def test_a_key_tells_functions_of_one_name_apart(x):
    clock = StepTimer()
    for factor in (2, 3):
        step = Step("times", lambda x, factor=factor: factor * x, ("x",), key=factor)
        measured = clock.measure([step], {"x": x}, scope="a", rounds=1)
        np.testing.assert_array_equal(measured.values["times"], factor * np.arange(6))


@pytest.fixture
def gpu(monkeypatch):
    """Kernels that take a microsecond more each time; what was run on which memory."""
    runs = []

    def kernel_times(run, inputs, *, repeats, calls, detach):
        assert (repeats, detach) == (1, False)
        assert calls == len(inputs) == len(run(inputs))
        runs.append([args[0].unsafe_buffer_pointer() for args in inputs])
        return CallTime.of([float(len(runs))])

    monkeypatch.setattr(steps, "kernel_times", kernel_times)
    return runs


def test_rounds_alternate_and_inputs_are_copied(gpu, x):
    measured = StepTimer("kernels").measure(STEPS, {"x": x}, scope="a", rounds=3)
    assert measured.samples_us == {"double": [1.0, 4.0, 5.0], "sum": [2.0, 3.0, 6.0]}
    assert all(len(set(pointers)) == 2 for pointers in gpu)


def test_a_driver_that_forbids_kernel_times_leaves_the_wall_clock(monkeypatch):
    def kernel_times(*args, **kwargs):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(steps, "is_nvidia", lambda device: True)
    monkeypatch.setattr(steps, "kernel_times", kernel_times)
    assert StepTimer().name == "wall"


@pytest.mark.gpu
def test_device_time_of_a_gpu():
    clock = StepTimer()
    assert clock.name == "kernels"
    x = jnp.ones((1 << 14, 1 << 13), jnp.float32)
    step = Step("sum", lambda x: x.sum(axis=1), ("x",))
    measured = clock.measure([step], {"x": jax.block_until_ready(x)}, scope="a", rounds=2)
    for us in measured.samples_us["sum"]:
        assert 0.5e12 < x.nbytes / (us * 1e-6) < 10e12
    assert steps.device_peak_bytes() >= x.nbytes

"""Copies that a cache does not hold, and what kernel times say without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.measure import clock
from bench.measure.clock import CallTime, copies_of, kernel_times, num_copies, require_nvidia_gpu, rotated


@pytest.mark.parametrize(
    ("num_bytes", "copies"), [(1, 8), (75_000_000, 8), (117_440_512, 6), (235e6, 3), (599e6, 2), (600e6, 1), (5e9, 1)]
)
def test_copies_take_600_megabytes_but_are_eight_at_most(num_bytes, copies):
    assert num_copies(num_bytes) == copies


def test_copies_are_other_memory_with_the_same_numbers():
    inputs = (jnp.arange(5.0), {"b": jnp.ones((2, 3), jnp.bfloat16)})
    copies = copies_of(inputs)
    assert len(copies) == 8
    assert len({copy[0].unsafe_buffer_pointer() for copy in copies}) == 8
    for copy in copies:
        np.testing.assert_array_equal(copy[0], inputs[0])
        np.testing.assert_array_equal(copy[1]["b"], inputs[1]["b"])


def test_a_rotated_function_is_traced_once_and_called_on_each():
    traced = []

    def f(x, y):
        traced.append(x)
        return x * y

    results = rotated(f)([(jnp.float32(i), jnp.float32(10)) for i in range(4)])
    assert [float(x) for x in results] == [0, 10, 20, 30]
    assert len(traced) == 1


def test_summary_of_repeats():
    assert CallTime.of([5.0, 3.0, 4.0, 9.0], {"a": 1.0}) == CallTime(4.5, 3.0, 6.0, {"a": 1.0})


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_is_an_error():
    with pytest.raises(ValueError, match="kernel times need an NVIDIA GPU, and jax runs on cpu here"):
        kernel_times(jnp.sin, jnp.ones(3))


def test_other_gpus_are_an_error(monkeypatch):
    class Device:
        platform = "gpu"

        class client:
            platform_version = "PJRT C API\nrocm 60400"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    with pytest.raises(ValueError, match="need an NVIDIA GPU, and jax runs on PJRT C API rocm 60400 here"):
        require_nvidia_gpu()


def test_repeats_below_one_are_an_error():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        kernel_times(jnp.sin, jnp.ones(3), repeats=0)


@pytest.mark.gpu
def test_reading_memory_takes_as_long_as_its_bandwidth_says():
    x = jnp.ones((1 << 15, 1 << 14), jnp.float32)
    time = kernel_times(jax.jit(lambda x: x.sum(axis=1)), x, repeats=3)
    assert 0.5e12 < x.nbytes / (time.median_us * 1e-6) < 10e12
    assert time.kernels


def test_kernels_are_the_median_repeat_of_the_sum_of_their_launches(monkeypatch):
    from jax.experimental.mosaic.gpu import profiler

    repeats = iter([[("a", 1.0), ("b", 2.0), ("a", 3.0)], [("a", 9.0), ("b", 4.0)], [("a", 5.0), ("b", 3.0)]])
    monkeypatch.setattr(clock, "require_nvidia_gpu", lambda: None)
    monkeypatch.setattr(profiler.Cupti, "measure", lambda *_, **__: lambda *args: (None, next(repeats)))
    time = clock.kernel_times(jnp.sin, jnp.ones(3), repeats=3, calls=2)
    assert time == CallTime(4000.0, 3000.0, 3500.0, {"a": 2500.0, "b": 1500.0})
    assert list(time.kernels) == ["a", "b"]

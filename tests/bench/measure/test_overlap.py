"""The formula of the overlap, and which programs are timed for it."""

import jax.numpy as jnp
import pytest

from bench.measure import overlap
from bench.measure.clock import CallTime
from bench.measure.overlap import OverlapTimes, measure_overlap


@pytest.mark.parametrize(
    ("elapsed", "comp", "dma", "expected"),
    [
        (30.0, 30.0, 20.0, 1.0),  # the shorter is hidden
        (50.0, 30.0, 20.0, 0.0),  # one after the other
        (40.0, 30.0, 20.0, 0.5),
        (40.0, 20.0, 30.0, 0.5),
        (60.0, 30.0, 20.0, -0.5),  # not clipped
        (28.0, 30.0, 20.0, 1.1),
    ],
)
def test_overlap(elapsed, comp, dma, expected):
    times = OverlapTimes(elapsed, comp, dma)
    assert times.overlap == pytest.approx(expected)
    assert times.record()["overlap"] == times.overlap


def test_each_stage_is_timed_over_all_inputs(monkeypatch):
    timed = []

    def kernel_times(program, inputs, *, repeats, calls):
        timed.append([float(x) for x in program(inputs)])
        return CallTime.of([float(len(timed))])

    monkeypatch.setattr(overlap, "kernel_times", kernel_times)
    factor = {"full": 1.0, "comp": 2.0, "dma": 3.0}
    inputs = [(jnp.float32(1),), (jnp.float32(10),)]
    times = measure_overlap(lambda stage: lambda x: x * factor[stage], inputs, repeats=2)
    assert timed == [[1, 10], [2, 20], [3, 30]]
    assert times == OverlapTimes(1.0, 2.0, 3.0)
